// Draws a part of a cube [bins of steps, ranks, parameters] for each mode: steps across with the
// ranks side by side, or the ranks at one step.
const heatmap = (() => {
  const steps = (mode, bin) => mode.first[bin] === mode.last[bin] ? `step ${mode.first[bin]}` : `steps ${mode.first[bin]} to ${mode.last[bin]}`;
  const columns = (mode, view, rank, bin) => {
    const ranks = mode.ranks.map((_, i) => i).filter(i => view === "step" || rank === "all" || String(mode.ranks[i]) === rank);
    if (view === "step") return ranks.map((i, at) => ({ rank: i, bin, at, block: 0 }));
    const gap = Math.max(1, Math.round(mode.first.length / 25));
    return ranks.flatMap((i, block) => mode.first.map((_, b) => ({ rank: i, bin: b, at: block * (mode.first.length + gap) + b, block })));
  };
  const axis = (mode, shown, view, narrow) => {
    if (view === "step") return { tickvals: shown.map(c => c.at), ticktext: shown.map(c => `rank ${mode.ranks[c.rank]}`), title: { text: "rank" } };
    const B = mode.first.length, blocks = new Set(shown.map(c => c.block)).size;
    const every = Math.max(1, Math.ceil(B * blocks / (narrow ? 5 : 16)));
    const ticks = shown.filter(c => c.bin % every === 0);
    return { tickvals: ticks.map(c => c.at), ticktext: ticks.map(c => String(mode.first[c.bin])), title: { text: "step" }, tickangle: 0 };
  };
  const heading = (mode, shown, view) => view === "step" ? [] : [...new Set(shown.map(c => c.rank))].map(rank => {
    const own = shown.filter(c => c.rank === rank);
    return { x: (own[0].at + own[own.length - 1].at) / 2, y: 1, xref: "x", yref: "paper", yanchor: "bottom", showarrow: false, text: `rank ${mode.ranks[rank]}` };
  });
  // Shares of the limit: blue below 1, orange above.
  const scale = colour => ({
    cmin: -3, cmax: 3,
    colorscale: [[0, colour("--cold")], [0.5, colour("--cool")], [0.5, colour("--warm")], [1, colour("--hot")]],
    colorbar: {
      thickness: 12, outlinewidth: 0, lenmode: "pixels", len: 190, y: 1, yanchor: "top", title: { text: "× limit", side: "top", font: { size: 12 } },
      tickvals: [-3, -1.5, 0, 1.5, 3], ticktext: ["≤0.001", "0.03", "<b>1</b>", "30", "≥1000"],
    },
  });
  // The data and the changes of the layout for what the controls say.
  const drawn = (cube, chosen, colour, narrow) => {
    const mode = cube.modes.find(m => m.mode === chosen.mode);
    if (!mode) return { trace: { z: [], x: [], text: [] }, layout: { annotations: [] } };
    const codes = mode.codes ||= hover.bytes(mode.bytes);
    const P = cube.parameters.length, R = mode.ranks.length;
    const shown = columns(mode, chosen.view, chosen.rank, chosen.bin);
    const code = (column, p) => codes[(column.bin * R + column.rank) * P + p];
    const power = c => c === cube.nothing ? null : cube.lowest + c / cube.per_decade;
    const value = c => c === cube.nothing ? "nothing compared" : c === cube.nothing - 1 ? "NaN or infinite" : c === 0 ? "0, or less than 1e-8 × its limit" : `about ${hover.short(10 ** power(c))} × its limit`;
    const rows = cube.parameters.map((_, p) => p);
    const last = shown.length ? shown[shown.length - 1].at : 0;
    // Empty columns keep the blocks of the ranks apart.
    const across = Array.from({ length: last + 1 }, () => null);
    for (const column of shown) across[column.at] = column;
    return {
      trace: {
        x: across.map((_, at) => at), y: rows,
        z: rows.map(p => across.map(c => c && power(code(c, p)))),
        text: rows.map(p => across.map(c => c && `${cube.parameters[p]}<br>rank ${mode.ranks[c.rank]}, ${steps(mode, c.bin)}<br>${value(code(c, p))}`)),
        hovertemplate: "%{text}<extra></extra>", hoverongaps: false, xgap: across.length > 60 ? 0 : 1, ygap: 1,
      },
      layout: {
        coloraxis: scale(colour),
        annotations: heading(mode, shown, chosen.view),
        xaxis: { ...axis(mode, shown, chosen.view, narrow), range: [-0.5, last + 0.5] },
      },
    };
  };
  const worst = cube => cube.modes.reduce((best, mode) => {
    const codes = mode.codes ||= hover.bytes(mode.bytes);
    const most = codes.reduce((a, c) => c !== cube.nothing && c > a ? c : a, -1);
    return most > best.most ? { most, mode: mode.mode } : best;
  }, { most: -2, mode: null }).mode;
  return { drawn, worst, steps, scale };
})();
