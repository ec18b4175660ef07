(() => {
  const root = document.documentElement;
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const charts = all(".chart");
  const specs = new Map();
  const hidden = new Set();

  // Theme: the system's until the button is pressed; no storage, which a sandbox would refuse.
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = "system", printing = false;
  const colour = name => getComputedStyle(root).getPropertyValue(name).trim();
  const setTheme = () => { root.dataset.theme = printing ? "light" : chosen === "system" ? (dark.matches ? "dark" : "light") : chosen; };
  setTheme();

  const themed = layout => {
    const [ink, rule, ground, raised] = ["--ink", "--rule", "--ground", "--raised"].map(colour);
    const changed = { paper_bgcolor: ground, plot_bgcolor: ground, "font.color": ink, "hoverlabel.bgcolor": raised, "hoverlabel.font.color": ink, "hoverlabel.bordercolor": rule };
    for (const axis of Object.keys(layout).filter(key => /^[xy]axis\d*$/.test(key))) {
      for (const part of ["gridcolor", "linecolor", "zerolinecolor"]) changed[`${axis}.${part}`] = rule;
    }
    if (layout.meta && layout.meta.shares) changed.coloraxis = heatmap.scale(colour);
    return changed;
  };
  const put = (target, changes) => {
    for (const [path, value] of Object.entries(changes)) {
      const keys = path.split(".");
      const owner = keys.slice(0, -1).reduce((at, key) => (at[key] ||= {}), target);
      owner[keys[keys.length - 1]] = value;
    }
  };

  const specOf = element => {
    if (!specs.has(element)) {
      const spec = JSON.parse(document.getElementById(`${element.id}-data`).textContent);
      const resolve = value => {
        if (!value || typeof value !== "object") return value;
        if (value.$ !== undefined) {
          const array = spec.arrays[value.$];
          return Array.isArray(array) ? [...array] : { ...array };
        }
        for (const key of Object.keys(value)) value[key] = resolve(value[key]);
        return value;
      };
      resolve(spec.data);
      resolve(spec.layout);
      spec.data.forEach(hover.told);
      specs.set(element, spec);
    }
    return specs.get(element);
  };
  const isHidden = trace => trace.meta && hidden.has(trace.meta.mode);

  // A chart that is out of sight waits, whatever changed, until it is scrolled near.
  const stale = new Map();
  const near = new Set();
  const later = (what, elements = charts) => {
    for (const element of elements) {
      if (!element.dataset.drawn) continue;
      stale.set(element, new Set([...(stale.get(element) || []), what]));
      element.dataset.stale = "yes";
      if (near.has(element)) refresh(element);
    }
  };
  const refresh = element => {
    const changes = stale.get(element);
    if (!changes || !element.clientWidth) return;
    stale.delete(element);
    delete element.dataset.stale;
    const spec = specOf(element);
    if (changes.has("size")) Plotly.Plots.resize(element);
    if (spec.cube) { Plotly.react(element, ...cubed(element, spec)); return; }
    if (changes.has("theme")) Plotly.relayout(element, themed(element.layout));
    if (changes.has("modes")) {
      const changed = element.data.map((trace, i) => i).filter(i => isHidden(element.data[i]) !== (element.data[i].visible === false));
      if (changed.length) Plotly.restyle(element, { visible: changed.map(i => !isHidden(element.data[i])) }, changed);
    }
  };

  const cubed = (element, spec) => {
    const controls = specControls(element, spec);
    const { trace, layout } = heatmap.drawn(spec.cube, controls, colour, element.clientWidth < 480);
    const full = { ...spec.layout, ...layout, xaxis: { ...spec.layout.xaxis, ...layout.xaxis } };
    full.uirevision = `${controls.mode} ${controls.view} ${controls.rank}`;
    put(full, themed(full));
    return [[{ ...spec.data[0], ...trace }], full];
  };
  // As text: the names in a chart's data are escaped for Plotly.
  const nameOf = mode => document.querySelector(`input[name=mode][value="${mode}"]`).closest("label").textContent.trim();
  const specControls = (element, spec) => {
    const box = element.closest("figure").querySelector(".controls");
    const [mode, view, rank, step] = ["mode", "view", "rank", "step"].map(name => box.querySelector(`[data-control="${name}"]`));
    if (!mode.options.length) {
      for (const each of spec.cube.modes) mode.add(new Option(nameOf(each.mode), each.mode));
      box.dataset.wanted = heatmap.worst(spec.cube);
      mode.addEventListener("input", () => { box.dataset.wanted = mode.value; });
      box.addEventListener("input", () => later("modes", [element]));
    }
    for (const option of mode.options) option.disabled = hidden.has(Number(option.value));
    // A mode that the filter hides makes way for another, and comes back with the filter.
    const open = [...mode.options].filter(option => !option.disabled);
    const choice = open.find(option => option.value === box.dataset.wanted) || open[0];
    mode.value = choice ? choice.value : "";
    const own = spec.cube.modes.find(each => String(each.mode) === mode.value);
    if (own && rank.dataset.mode !== mode.value) {
      const before = rank.value;
      rank.replaceChildren(new Option("all, side by side", "all"), ...own.ranks.map(r => new Option(`rank ${r}`, r)));
      rank.value = own.ranks.map(String).includes(before) ? before : "all";
      rank.dataset.mode = mode.value;
      step.max = own.first.length - 1;
    }
    rank.closest("label").hidden = view.value === "step";
    step.closest("label").hidden = view.value !== "step";
    const bin = Math.min(Number(step.value), own ? own.first.length - 1 : 0);
    if (own) box.querySelector("output").textContent = heatmap.steps(own, bin);
    return { mode: own ? own.mode : null, view: view.value, rank: rank.value, bin };
  };

  const draw = element => {
    // What is folded has a width all the same.
    if (element.dataset.drawn || !element.clientWidth || !element.checkVisibility()) return;
    element.dataset.drawn = "yes";
    const spec = specOf(element);
    const narrow = element.clientWidth < 480;
    if (narrow) spec.layout.margin = { ...spec.layout.margin, l: 40, r: spec.cube ? 70 : 8 };
    let [data, layout] = [spec.data, spec.layout];
    if (spec.cube) [data, layout] = cubed(element, spec);
    else {
      data.forEach(trace => { if (isHidden(trace)) trace.visible = false; });
      put(layout, themed(layout));
    }
    const description = element.getAttribute("aria-label");
    Plotly.newPlot(element, data, layout, { responsive: true, displaylogo: false, showSendToCloud: false, displayModeBar: narrow ? false : "hover", modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] });
    if (description) element.setAttribute("aria-label", description);
    if (!root.dataset.firstChart) root.dataset.firstChart = String(Math.round(performance.now()));
  };

  const queue = [];
  const work = () => {
    const element = queue.shift();
    if (element && near.has(element)) { draw(element); refresh(element); }
    if (queue.length) setTimeout(work);
  };
  const watch = new IntersectionObserver(entries => {
    const idle = !queue.length;
    for (const entry of entries) {
      near[entry.isIntersecting ? "add" : "delete"](entry.target);
      if (entry.isIntersecting) queue.push(entry.target);
    }
    if (idle && queue.length) setTimeout(work);
  }, { rootMargin: "500px 0px" });
  charts.forEach(element => watch.observe(element));
  // Unless it is folded the first is drawn in any case, so that whoever scrolls finds one at once.
  if (charts.length) setTimeout(() => draw(charts[0]));

  // Filters and open sections stand in the address, as #mode=a&mode=b&regime=clip&open=noise, so that a
  // link shows the same.
  const boxes = all("input[name=mode]"), radios = all("input[name=regime]"), parts = all("details[id]");
  const isOpenAtFirst = new Map(parts.map(part => [part, part.open]));
  const address = () => {
    if (printing) return;
    const state = new URLSearchParams();
    if (hidden.size) boxes.forEach(box => box.checked && state.append("mode", nameOf(box.value)));
    for (const radio of radios) if (radio.checked && radio.value) state.set("regime", radio.value);
    for (const part of parts) if (part.open !== isOpenAtFirst.get(part)) state.append(part.open ? "open" : "closed", part.id);
    if (!state.size && !location.hash.includes("=")) return;
    // A page within another, as in MLflow, may not change its address.
    try { history.replaceState(null, "", state.size ? `#${state}` : location.pathname + location.search); } catch {}
  };
  const restore = () => {
    const state = new URLSearchParams(location.hash.slice(1)), modes = state.getAll("mode");
    const wanted = boxes.filter(box => modes.includes(nameOf(box.value)));
    if (wanted.length) boxes.forEach(box => { box.checked = wanted.includes(box); });
    for (const radio of radios) if (radio.value && radio.value === state.get("regime")) radio.checked = true;
    for (const part of parts) {
      if (state.getAll("open").includes(part.id)) part.open = true;
      if (state.getAll("closed").includes(part.id)) part.open = false;
    }
  };
  document.addEventListener("toggle", address, true);

  // Filters: of modes, and of regimes.
  const filterModes = () => {
    address();
    all("[data-mode-row]").forEach(row => { row.hidden = hidden.has(Number(row.dataset.modeRow)); });
    later("modes");
  };
  for (const box of boxes) {
    box.addEventListener("change", () => {
      hidden[box.checked ? "delete" : "add"](Number(box.value));
      filterModes();
    });
  }
  const everything = document.getElementById("all-modes");
  if (everything) everything.addEventListener("click", () => {
    boxes.forEach(box => { box.checked = true; });
    hidden.clear();
    filterModes();
  });
  for (const radio of radios) {
    radio.addEventListener("change", () => {
      address();
      for (const part of all("[data-regime]")) part.hidden = radio.value !== "" && part.dataset.regime !== radio.value;
      later("size");
    });
  }
  // A browser that comes back to the page may remember what was ticked.
  const filterAll = () => {
    hidden.clear();
    boxes.forEach(box => { if (!box.checked) hidden.add(Number(box.value)); });
    filterModes();
    const radio = radios.find(each => each.checked);
    if (radio) radio.dispatchEvent(new Event("change"));
  };
  addEventListener("pageshow", filterAll);

  const recolour = () => { setTheme(); later("theme"); };
  dark.addEventListener("change", recolour);
  const button = document.getElementById("theme");
  if (button) button.addEventListener("click", () => {
    chosen = { system: "light", light: "dark", dark: "system" }[chosen];
    button.querySelector("span").textContent = chosen;
    recolour();
  });

  // A link to what is folded opens it.
  const unfold = () => {
    if (location.hash.includes("=")) {
      restore();
      filterAll();
      return;
    }
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    for (let part = target; part; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
    if (target) target.scrollIntoView({ block: "start" });
  };
  addEventListener("hashchange", unfold);
  unfold();

  // On paper there is no scrolling near: everything is drawn, unfolded, dark on light, as wide as
  // the page.
  const folded = [];
  const bar = document.querySelector(".bar");
  if (bar) new ResizeObserver(() => root.style.setProperty("--bar", `${bar.offsetHeight + 12}px`)).observe(bar);

  const beforePrint = () => {
    if (printing) return;
    printing = true;
    setTheme();
    all("details:not([open])").forEach(part => { part.open = true; folded.push(part); });
    root.dataset.paper = "yes";
    for (const element of charts) {
      const wasDrawn = element.dataset.drawn;
      draw(element);
      near.add(element);
      // Plotly's own resizing would come too late.
      if (wasDrawn) Plotly.relayout(element, { width: element.clientWidth });
    }
    later("theme");
  };
  const afterPrint = () => {
    if (!printing) return;
    printing = false;
    delete root.dataset.paper;
    folded.splice(0).forEach(part => { part.open = false; });
    for (const element of charts) if (element.dataset.drawn) Plotly.relayout(element, { width: null, autosize: true });
    later("size");
    recolour();
  };
  addEventListener("beforeprint", beforePrint);
  addEventListener("afterprint", afterPrint);
  matchMedia("print").addEventListener("change", event => event.matches ? beforePrint() : afterPrint());

  // Where a table is wider than the page, each row is a list of cells with their headings.
  const stacker = new ResizeObserver(entries => {
    for (const { target: scroll } of entries) {
      const table = scroll.firstElementChild, width = scroll.clientWidth;
      if (!width) continue;
      if (!table.classList.contains("stacked")) table.dataset.width = table.offsetWidth;
      table.classList.toggle("stacked", table.dataset.width > width);
    }
  });
  for (const table of all(".scroll > table:not(.stages)")) {
    const headings = [...table.tHead.rows[0].cells].map(cell => cell.textContent);
    const role = (elements, name) => { for (const element of elements) element.setAttribute("role", name); };
    role([table], "table");
    role([table.tHead, ...table.tBodies], "rowgroup");
    role(table.rows, "row");
    role(table.tHead.rows[0].cells, "columnheader");
    for (const row of table.tBodies[0].rows) {
      [...row.cells].forEach((cell, column) => {
        role([cell], cell.tagName === "TH" ? "rowheader" : "cell");
        cell.dataset.heading = headings[column];
      });
    }
    stacker.observe(table.parentElement);
  }

  for (const copy of all("button.copy")) {
    copy.addEventListener("click", async () => {
      const source = document.getElementById(copy.dataset.from), said = document.getElementById(copy.dataset.says);
      try {
        await navigator.clipboard.writeText(source.textContent);
        said.textContent = "Copied.";
      } catch {
        getSelection().selectAllChildren(source);
        said.textContent = document.execCommand("copy") ? "Copied." : "Selected: press Ctrl+C or ⌘C.";
      }
    });
  }
})();
