"""`modes`: lists the available modes, or how they form the gradients of a model's layers."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from dpsgd_track.cli.context import say
from dpsgd_track.cli.options import WhyChoices
from dpsgd_track.config import DataConfig, ModelConfig
from dpsgd_track.launcher import EXIT_FAILED, EXIT_FINISHED
from dpsgd_track.launcher.variants import own_modes, read_variants
from dpsgd_track.modes.table import MODES, name_of_opacus, plugged_in_modes, spec_of
from dpsgd_track.report.columns import in_columns


def list_modes(variants: Sequence[str] = ()) -> int:
    """Print the table of modes, including those of installed packages and of variants.

    Raises:
        ValueError: one of the latter cannot be used.
    """
    read = read_variants(variants)
    rows = [("mode", "norm rule", "strategy", "sharding", "")]
    rows += [(m.name, m.norm_rule, m.strategy, m.sharding, m.summary) for m in MODES.values()]
    rows += [(name, "", "", "", factory) for name, factory in plugged_in_modes().items()]
    for variant in read:
        specs = [spec_of(name_of_opacus(name)) for name in own_modes(variant)]
        rows += [
            (f"{s.name}@{variant.name}", s.norm_rule, s.strategy, s.sharding, s.summary)
            for s in specs
            if s is not None
        ]
        if not specs:
            which = "any mode that imports its packages" if variant.root else "any that can"
            rows.append((f"...@{variant.name}", "", "", "", which))
    print("\n".join(in_columns(rows)))
    return EXIT_FINISHED


def tell_layers(choices: WhyChoices) -> int:
    """Print how the gradients of each layer of a model are formed, at what cost, or why not.

    Returns:
        1 where a layer is refused, else 0.

    Raises:
        ValueError: the model cannot be built, or does not fit its task.
    """
    model = ModelConfig(
        name=choices.why,
        task=choices.task,
        vocab_size=choices.vocab_size,
        num_labels=choices.num_labels,
    )
    data = DataConfig(seq_length=choices.seq_length, image_size=choices.image_size)
    # Imports torch and transformers, which the list of modes does not need.
    from dpsgd_track.training.layer_table import counts, layer_table

    logging.getLogger("dpsgd_track").setLevel(logging.ERROR)
    table = layer_table(model, data)
    rows = [("layer", "number", "type", "rule", "gradient", "how", "cost")]
    for each in table:
        told = each.account
        outcome = "refused" if each.refusal else "exact"
        cells = each.name, str(each.count), told.type, told.rule, outcome, told.way, told.cost
        rows.append(cells)
    say("\n".join(in_columns(rows)))
    advised = [(each.name, each.refusal or each.account.advice) for each in table]
    for name, advice in advised:
        if advice:
            say(f"{name}: {advice}.".replace("..", "."))
    exact, refused = counts(table)
    say(f"{choices.why} ({choices.task}): {exact} exact, {refused} refused.")
    return EXIT_FAILED if refused else EXIT_FINISHED
