"use strict";
// What is said of a point, computed from its numbers when its chart is drawn. Names have been
// escaped for Plotly before they came here.
const hover = (() => {
  const types = { f4: Float32Array, f8: Float64Array, i1: Int8Array, i2: Int16Array, i4: Int32Array, u1: Uint8Array, u2: Uint16Array, u4: Uint32Array };
  const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const values = array => array && array.bdata !== undefined ? new types[array.dtype](bytes(array.bdata).buffer) : array || [];
  const short = v => v === 0 ? "0" : Math.abs(v) >= 1e-2 && Math.abs(v) < 1e4 ? String(Number(v.toPrecision(3))) : v.toExponential(1);
  const signed = v => (v > 0 ? "+" : "") + short(v);
  const times = (v, unit, what) => unit > 0 ? `${short(v / unit)} × the ${what}` : v === 0 ? `at the ${what}` : `over a ${what} of 0`;
  const ZERO = 1.1e-17;
  const said = {
    value: (meta, x, y) => [`step ${x}`, `${meta.quantity} ${Number(y.toPrecision(7))}`],
    difference: (meta, x, y) => [`step ${x}`, `${signed(y)} from ${meta.base}`, ...(meta.floor == null ? [] : [times(Math.abs(y), meta.floor, "floor")])],
    drift: (meta, x, y, which, ends, limit) => [
      `step ${x}`,
      y < ZERO ? "0, bitwise equal" : `${short(y * limit)}, ${short(y)} × its limit of ${short(limit)}`,
      times(y < ZERO ? 0 : y * limit, meta.threshold, "threshold"),
      ...(meta.floor == null ? [] : [times(y < ZERO ? 0 : y * limit, meta.floor, "floor")]),
      ...(meta.prefix !== undefined ? [meta.prefix + which] : meta.names && meta.names[which] ? [meta.names[which]] : []),
    ],
    sample: (meta, x, y, [step, sample, rank]) => [`step ${step}, sample ${sample}, rank ${rank}`, `norm ${Number(x.toPrecision(6))}`, `ratio - 1: ${signed(y)}`, meta.clipped ? "clipped" : "not clipped"],
    noise: (meta, x, y, which, [low, high]) => [meta.names[which], `${x.toPrecision(4)} of sigma C`, `interval ${low.toPrecision(4)} to ${high.toPrecision(4)}`],
  };
  const told = trace => {
    const kind = trace.meta && trace.meta.hover;
    if (!kind) return;
    const x = values(trace.x), y = values(trace.y), data = values(trace.customdata);
    const ends = trace.error_x ? [values(trace.error_x.arrayminus), values(trace.error_x.array)] : [];
    const limits = trace.meta.limits, limitOf = typeof limits === "object" && limits ? (each => i => each[i])(values(limits)) : () => limits;
    const which = i => kind === "sample" ? data.slice(3 * i, 3 * i + 3) : kind === "noise" ? i : data[i];
    trace.text = Array.from(y, (value, i) => Number.isFinite(value)
      ? [trace.name, ...said[kind](trace.meta, x[i], value, which(i), ends.length ? [x[i] - ends[0][i], x[i] + ends[1][i]] : [], limitOf(i))].join("<br>")
      : "");
    trace.hovertemplate = "%{text}<extra></extra>";
    delete trace.customdata;
  };
  return { told, bytes, short };
})();
