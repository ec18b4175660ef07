"""Modes are resolved by name without importing torch or Opacus."""

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

from dpsgd_track.modes import table
from dpsgd_track.modes.build import build_mode
from dpsgd_track.modes.protocol import Mode, ProtocolError

PLACES = {"fsdp2", "opacus_fsdp2", "replicated", "none"}


class Made(Mode):
    """Keeps what it was made with."""

    def __init__(self, model, context):
        self.model, self.context = model, context

    def accumulate(self, batch):
        raise NotImplementedError


@pytest.fixture
def plug_in(monkeypatch):
    def plug_in(**modes: str) -> None:
        found = [EntryPoint(name, factory, table._ENTRY_POINTS) for name, factory in modes.items()]
        monkeypatch.setattr(table.metadata, "entry_points", lambda group: found)

    return plug_in


def test_a_mode_says_where_it_runs_by_its_name():
    for name, spec in table.MODES.items():
        assert spec.sharding in PLACES
        on_several = name in ("no_dp", "reference") or "_fsdp" in name
        assert spec.runs_on_one_device is not on_several
        assert (spec.strategy == "opacus") is bool(spec.grad_sample_mode)


def test_each_fsdp_mode_has_its_counterpart_on_one_device():
    for name, spec in table.MODES.items():
        if spec.sharding == "fsdp2" and name != "no_dp":
            single = table.MODES[name.replace("_fsdp", "")]
            assert (single.norm_rule, single.strategy) == (spec.norm_rule, spec.strategy)
            assert single.runs_on_one_device


@pytest.mark.parametrize(
    ("name", "sharding"), [("ghost_fsdp", "opacus_fsdp2"), ("hooks", "none"), ("new_one", "none")]
)
def test_any_mode_of_opacus_has_a_name(name, sharding):
    table.check_mode(f"opacus:{name}")
    spec = table.spec_of(f"opacus:{name}")
    assert spec is not None
    assert (spec.strategy, spec.sharding, spec.grad_sample_mode) == ("opacus", sharding, name)
    assert table.is_private(f"opacus:{name}")
    assert table.runs_on_one_device(f"opacus:{name}") is (sharding == "none")


@pytest.mark.parametrize("name", ["opacus.optimizers:get_optimizer_class", "opacus_fork:make"])
def test_a_factory_in_or_beside_opacus_is_a_users_own(name):
    assert table.spec_of(name) is None
    assert table.factory_of(name) == name
    assert not table.runs_on_one_device(name)


def test_an_installed_package_brings_a_mode(plug_in):
    plug_in(mine="json:loads")
    table.check_mode("mine")
    assert table.spec_of("mine") is None
    assert table.is_private("mine")
    assert table.factory_of("mine") == "json:loads"


def test_an_entry_points_factory_makes_the_mode(plug_in):
    plug_in(mine="tests.test_mode_table:Made")
    mode = build_mode("mine", "model", "context")
    assert isinstance(mode, Made)
    assert (mode.model, mode.context) == ("model", "context")


def test_a_factory_that_makes_no_mode_is_refused(plug_in):
    plug_in(mine="builtins:slice")
    with pytest.raises(ProtocolError, match=r"^mine: expected a Mode, .* returned slice\.$"):
        build_mode("mine", "model", "context")


def test_an_unknown_name_is_answered_by_all_known_ones(plug_in):
    plug_in(mine="json:loads")
    with pytest.raises(
        ValueError, match=r"mode='flush': expected one of no_dp, .*flash_fuse.* mine,"
    ):
        table.check_mode("flush")


@pytest.mark.parametrize(
    ("modes", "message"),
    [
        ({"flash_fsdp": "pkg:make"}, "mode='flash_fsdp': expected a name that no other mode has"),
        ({"a-b": "pkg:make"}, "mode='a-b': expected an identifier"),
    ],
)
def test_a_name_that_cannot_be_told_apart_is_refused(plug_in, modes, message):
    plug_in(**modes)
    with pytest.raises(ValueError, match=message):
        table.check_mode("mine")


def test_two_packages_cannot_bring_one_name(monkeypatch):
    found = [EntryPoint("mine", value, table._ENTRY_POINTS) for value in ("a:make", "b:make")]
    monkeypatch.setattr(table.metadata, "entry_points", lambda group: found)
    with pytest.raises(ValueError, match="mine = b:make"):
        table.plugged_in_modes()


def test_a_built_in_mode_is_found_without_looking_at_packages(monkeypatch):
    def look(group):
        raise AssertionError("looked")

    monkeypatch.setattr(table.metadata, "entry_points", look)
    for name in table.MODES:
        table.check_mode(name)


def test_checking_names_imports_neither_torch_nor_opacus():
    code = (
        "import sys; from dpsgd_track.modes.table import check_mode, plugged_in_modes;"
        "check_mode('opacus:ghost'); plugged_in_modes();"
        "assert not {'torch', 'opacus'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
