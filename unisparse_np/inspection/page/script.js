"use strict";
// Views (one a config) of the same prompt. A cell is named by tokens, so that views with different block sizes point at one place.
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const STEPS = 65535;
  // Okabe and Ito's colours, told apart by colour-blind readers too. In the order in which a cell shows them.
  const REASONS = [
    { bit: 16, name: "forced: diagonal", get colour() { return themed("--diagonal"); } },
    { bit: 4, name: "forced: sink", colour: [230, 159, 0] },
    { bit: 8, name: "forced: local", colour: [0, 158, 115] },
    { bit: 1, name: "Top-P", colour: [0, 114, 178] },
    { bit: 2, name: "row threshold", colour: [204, 121, 167] },
  ];
  // From what is like the page to what stands out: one hue on light pages, and on dark ones cividis.
  const RAMPS = {
    light: [[241, 245, 250], [198, 216, 236], [121, 172, 214], [44, 112, 181], [8, 40, 96]],
    dark: [[16, 32, 62], [65, 77, 107], [124, 123, 120], [188, 175, 111], [255, 234, 70]],
  };

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const words = (text) => new Uint16Array(bytes(text).buffer);
  const element = (id) => document.getElementById(id);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const make = (tag, attributes, ...children) => {
    const node = document.createElement(tag);
    Object.assign(node, attributes);
    node.append(...children);
    return node;
  };

  // ---- the data of one layer, decoded when first looked at ----
  class Layer {
    constructor(raw) {
      Object.assign(this, raw);
      this.heads = raw.densities.length;
      this.entries = (raw.blocks * (raw.blocks + 1)) / 2;
      this.scores = words(raw.scores);
      this.ranks = raw.blocks <= 256 ? bytes(raw.ranks) : words(raw.ranks);
      this.reasons = bytes(raw.reasons);
      this.truth = raw.true_mass === null ? null : words(raw.true_mass);
    }
    at(head, i, j) { return head * this.entries + (i * (i + 1)) / 2 + j; }
    share(values, n) { const root = values[n] / STEPS; return root * root; }
    score(head, i, j) { return this.share(this.scores, this.at(head, i, j)); }
    trueMass(head, i, j) { return this.share(this.truth, this.at(head, i, j)); }
    reason(head, i, j) { return this.reasons[this.at(head, i, j)]; }
    rank(head, i, j) { return this.ranks[this.at(head, i, j)] + 1; }
    limit(head) { return Array.isArray(this.top_p) ? this.top_p[Math.floor(head / this.head_compress)] : this.top_p; }
    // Key blocks of query block i, the highest score first.
    order(head, i) {
      const order = new Array(i + 1);
      for (let j = 0; j <= i; j++) order[this.ranks[this.at(head, i, j)]] = j;
      return order;
    }
    runningSum(head, i, j) {
      const last = this.ranks[this.at(head, i, j)];
      return this.order(head, i).slice(0, last + 1).reduce((sum, block) => sum + this.score(head, i, block), 0);
    }
    range(block) { return [block * this.block_size, Math.min(data.tokens, (block + 1) * this.block_size) - 1]; }
  }
  const decoded = new Map();
  function layerOf(view) {
    const raw = view.layers.find((layer) => layer.layer === state.layer);
    if (raw !== undefined && !decoded.has(raw)) decoded.set(raw, new Layer(raw));
    return decoded.get(raw);
  }
  const reasonNames = (reason) => REASONS.filter((r) => reason & r.bit).map((r) => r.name).join(", ");
  const layerNumbers = [...new Set(data.views.flatMap((view) => view.layers.map((layer) => layer.layer)))].sort((a, b) => a - b);
  const numHeads = data.views[0].layers[0].densities.length;
  const hasTruth = data.views.every((view) => view.layers.every((layer) => layer.true_mass !== null));

  // ---- what is looked at: a query token and a key token; `held` is where a click has pinned it ----
  const state = { layer: data.focus.layer, head: data.focus.head, colour: "score", view: 0, query: 0, key: 0, held: null };

  // ---- colours ----
  function ramp(t) {
    const stops = dark.matches ? RAMPS.dark : RAMPS.light;
    const x = t * (stops.length - 1), n = Math.min(stops.length - 2, Math.floor(x));
    return [0, 1, 2].map((c) => Math.round(stops[n][c] + (x - n) * (stops[n + 1][c] - stops[n][c])));
  }
  function themed(name) {
    const value = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    return [1, 3, 5].map((start) => parseInt(value.slice(start, start + 2), 16));
  }
  const css = (rgb) => `rgb(${rgb.join(",")})`;
  const reasonColour = (reason) => (REASONS.find((r) => reason & r.bit) || { colour: themed("--dropped") }).colour;

  // ---- a map: a canvas with one pixel a cell, and two marks over it ----
  class CellMap {
    constructor(label, handlers) {
      this.canvas = make("canvas", { tabIndex: 0 });
      this.canvas.setAttribute("role", "application");
      this.canvas.setAttribute("aria-label", label);
      this.row = make("div", { className: "row" });
      this.cell = make("div", { className: "cell" });
      this.node = make("div", { className: "map" }, this.canvas, this.row, this.cell);
      const place = (event) => {
        const box = this.canvas.getBoundingClientRect();
        const part = (at, start, size, count) => Math.max(0, Math.min(count - 1, Math.floor(((at - start) / size) * count)));
        return [part(event.clientY, box.top, box.height, this.rows), part(event.clientX, box.left, box.width, this.columns)];
      };
      this.canvas.addEventListener("pointermove", (event) => handlers.point(...place(event)));
      this.canvas.addEventListener("pointerleave", () => handlers.leave());
      this.canvas.addEventListener("click", (event) => handlers.pick(...place(event)));
      this.canvas.addEventListener("keydown", (event) => {
        const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
        if (event.key === "Escape") handlers.release();
        if (step === undefined) return;
        event.preventDefault();
        const clamp = (value, count) => Math.max(0, Math.min(count - 1, value));
        handlers.pick(clamp(this.at[0] + step[0], this.rows), clamp(this.at[1] + step[1], this.columns));
      });
      this.at = [0, 0];
    }
    draw(rows, columns, colour) {
      this.rows = rows;
      this.columns = columns;
      this.canvas.width = columns;
      this.canvas.height = rows;
      const context = this.canvas.getContext("2d");
      const image = context.createImageData(columns, rows);
      for (let r = 0; r < rows; r++) for (let c = 0; c < columns; c++) image.data.set([...colour(r, c), 255], (r * columns + c) * 4);
      context.putImageData(image, 0, 0);
    }
    mark(r, c) {
      this.at = [r, c];
      const percent = (value, count) => `${(100 * value) / count}%`;
      Object.assign(this.row.style, { top: percent(r, this.rows), height: percent(1, this.rows) });
      Object.assign(this.cell.style, { top: percent(r, this.rows), height: percent(1, this.rows), left: percent(c, this.columns), width: percent(1, this.columns) });
    }
  }

  // ---- one config: kept blocks, heat map, ranking of the query block ----
  class View {
    constructor(view, number) {
      this.view = view;
      this.number = number;
      const handlers = {
        point: (i, j) => { if (j <= i) look(number, i, j, false); },
        leave: () => letGo(),
        pick: (i, j) => look(number, i, Math.min(i, j), true),
        release: () => { state.held = null; },
      };
      const name = view.label ? ` (${view.label})` : "";
      this.kept = new CellMap(`Kept blocks${name}: arrow keys move between blocks`, handlers);
      this.heat = new CellMap(`Heat map${name}: arrow keys move between blocks`, handlers);
      this.flags = make("p", {});
      this.density = make("span", {});
      this.heatName = make("span", {});
      this.heatTop = make("span", {});
      this.ticks = [0, 1].map(() => make("div", { className: "ticks" }));
      this.legend = make("div", { className: "legend" });
      this.ramp = make("div", { className: "ramp" });
      this.rampTicks = make("div", { className: "ticks" }, ...["0", "6%", "25%", "56%", "100%"].map((text) => make("span", { textContent: text })));
      this.rankingName = make("figcaption", {});
      this.ranking = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      this.ranking.setAttribute("role", "img");
      this.node = make("article", { className: "view" },
        make("h2", { textContent: view.label || "This config" }), this.flags,
        make("div", { className: "maps" },
          make("figure", { className: "kept-figure" }, make("figcaption", {}, make("span", { textContent: "Kept blocks" }), this.density), this.kept.node, this.ticks[0], this.legend),
          make("figure", { className: "heat-figure" }, make("figcaption", {}, this.heatName, this.heatTop), this.heat.node, this.ticks[1], this.ramp, this.rampTicks)),
        make("figure", { className: "ranking" }, this.rankingName, this.ranking));
    }
    draw() {
      const layer = (this.layer = layerOf(this.view));
      this.node.hidden = layer === undefined;
      if (layer === undefined) return;
      const head = state.head, future = themed("--future"), dropped = themed("--dropped");
      this.flags.textContent = layer.flags;
      this.density.textContent = `density ${layer.densities[head].toFixed(3)}`;
      this.kept.draw(layer.blocks, layer.blocks, (i, j) => (j > i ? future : reasonColour(layer.reason(head, i, j))));
      const value = {
        score: (i, j) => layer.score(head, i, j),
        truth: (i, j) => layer.trueMass(head, i, j),
        lost: (i, j) => (layer.reason(head, i, j) ? 0 : layer.trueMass(head, i, j)),
      }[state.colour];
      let highest = 0;
      this.heat.draw(layer.blocks, layer.blocks, (i, j) => {
        if (j > i) return future;
        const share = value(i, j);
        highest = Math.max(highest, share);
        return ramp(Math.sqrt(share));
      });
      this.heatName.textContent = { score: "Score (estimated)", truth: "Truth (dense)", lost: "Lost: truth on dropped blocks" }[state.colour];
      this.heatTop.textContent = `highest ${percent(highest)}`;
      for (const ticks of this.ticks) {
        ticks.replaceChildren(...[0, 1, 2, 3].map((n) => make("span", { textContent: Math.round((n / 3) * data.tokens).toLocaleString("en") })));
        ticks.lastChild.textContent += " tokens";
      }
      const used = layer.reasons.subarray(layer.at(head, 0, 0), layer.at(head + 1, 0, 0)).reduce((all, reason) => all | reason, 0);
      const entries = [...REASONS.filter((r) => used & r.bit), { name: "dropped", colour: dropped }];
      this.legend.replaceChildren(...entries.map((r) => {
        const swatch = make("i", {});
        swatch.style.background = css(r.colour);
        return make("span", {}, swatch, r.name);
      }));
      this.ramp.style.background = `linear-gradient(90deg, ${[0, 0.25, 0.5, 0.75, 1].map((t) => css(ramp(t))).join(",")})`;
    }
    mark() {
      if (this.layer === undefined) return;
      const [i, j] = this.blocks();
      this.kept.mark(i, j);
      this.heat.mark(i, j);
      this.rank(i, j);
    }
    blocks() {
      const i = Math.floor(state.query / this.layer.block_size);
      return [i, Math.min(i, Math.floor(state.key / this.layer.block_size))];
    }
    // Bars: scores in order, the height a square root; line: their running sum; dashes: P.
    rank(i, j) {
      const layer = this.layer, head = state.head, order = layer.order(head, i), limit = layer.limit(head);
      const shown = order.slice(0, 64), width = 100 / shown.length;
      const svg = (tag, attributes) => {
        const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
        for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
        return node;
      };
      this.ranking.setAttribute("viewBox", "0 0 100 100");
      this.ranking.setAttribute("preserveAspectRatio", "none");
      let sum = 0, line = "M0,100";
      const bars = shown.map((block, place) => {
        const score = layer.score(head, i, block), height = 100 * Math.sqrt(score);
        sum += score;
        line += ` L${(place + 0.5) * width},${100 - 100 * Math.min(1, sum)}`;
        const bar = svg("rect", { x: place * width, y: 100 - height, width: width * 0.86, height, fill: css(reasonColour(layer.reason(head, i, block))) });
        if (block === j) bar.setAttribute("class", "chosen");
        bar.addEventListener("click", () => look(this.number, i, block, true));
        return bar;
      });
      const marks = [svg("path", { d: line, class: "sum" })];
      if (limit !== null) marks.unshift(svg("line", { x1: 0, x2: 100, y1: 100 - 100 * limit, y2: 100 - 100 * limit, class: "limit" }));
      this.ranking.replaceChildren(...bars, ...marks);
      const more = order.length > shown.length ? `, the first ${shown.length} of ${order.length}` : "";
      const dashes = limit === null ? "" : `; dashes: P = ${limit}`;
      const text = `Key blocks of query block ${i} by score${more}. Line: running sum${dashes}`;
      this.rankingName.textContent = text;
      this.ranking.setAttribute("aria-label", text);
    }
  }

  // ---- the panel beside the maps ----
  const percent = (share) => (share >= 0.1 ? `${(100 * share).toFixed(1)}%` : share >= 0.001 ? `${(100 * share).toFixed(2)}%` : `${(100 * share).toPrecision(2)}%`);
  function details() {
    const active = views[state.view], [i, j] = active.blocks(), layer = active.layer;
    element("where").textContent = `Query block ${i}, key block ${j}`;
    const shown = views.filter((view) => view.layer !== undefined);
    const rows = [
      ["decision", (l, h, a, b) => (l.reason(h, a, b) ? `kept: ${reasonNames(l.reason(h, a, b))}` : "dropped")],
      ["score", (l, h, a, b) => percent(l.score(h, a, b))],
      ["rank", (l, h, a, b) => `${l.rank(h, a, b)} of ${a + 1}`],
      ["running sum", (l, h, a, b) => l.runningSum(h, a, b).toFixed(3) + (l.limit(h) === null ? "" : ` (P = ${l.limit(h)})`)],
      ...(hasTruth ? [["truth", (l, h, a, b) => percent(l.trueMass(h, a, b))]] : []),
    ];
    const body = rows.map(([name, text]) => make("tr", {}, make("th", { textContent: name, scope: "row" }), ...shown.map((view) => {
      const value = text(view.layer, state.head, ...view.blocks());
      return make("td", { textContent: value, className: name === "decision" && value !== "dropped" ? "kept" : "" });
    })));
    const heading = shown.length < 2 ? [] : [make("thead", {}, make("tr", {}, make("th", {}), ...shown.map((view) => make("th", { textContent: view.view.label, scope: "col" }))))];
    element("numbers").replaceChildren(make("table", {}, ...heading, make("tbody", {}, ...body)));
    for (const [part, block] of [["query", i], ["key", j]]) {
      const [first, last] = layer.range(block);
      element(`${part}-heading`).textContent = `${part === "query" ? "Query" : "Key"} block ${block}: tokens ${first} to ${last}`;
      element(`${part}-text`).textContent = data.texts[layer.block_size][block];
    }
  }

  // ---- what changes the picture ----
  function look(number, i, j, hold) {
    const layer = views[number].layer;
    Object.assign(state, { view: number, query: layer.range(i)[0], key: layer.range(j)[0] });
    if (hold) state.held = { view: number, query: state.query, key: state.key };
    point();
  }
  function letGo() {
    if (state.held === null) return;
    Object.assign(state, state.held);
    point();
  }
  function point() {
    for (const view of views) view.mark();
    details();
  }
  function draw() {
    element("layer").value = state.layer;
    element("head").value = state.head;
    for (const view of views) view.draw();
    if (views[state.view].layer === undefined) state.view = views.findIndex((view) => view.layer !== undefined);
    for (const map of overviews) map.show();
    point();
  }
  function step(list, current, by) { return list[Math.max(0, Math.min(list.length - 1, list.indexOf(current) + by))]; }

  // ---- density of every layer and head ----
  class Overview {
    constructor(view) {
      this.view = view;
      this.caption = make("span", {});
      const cell = (r, c) => `layer ${view.layers[r].layer}, head ${c}: ${view.layers[r].densities[c].toFixed(3)}`;
      this.map = new CellMap(`Density of layers (down) and heads (across)${view.label ? ` (${view.label})` : ""}`, {
        point: (r, c) => { this.caption.textContent = cell(r, c); },
        leave: () => this.show(),
        pick: (r, c) => { Object.assign(state, { layer: view.layers[r].layer, head: c }); draw(); },
        release: () => {},
      });
      this.cell = cell;
      this.map.node.style.aspectRatio = `${Math.max(numHeads, view.layers.length / 2)} / ${Math.min(view.layers.length, numHeads * 2)}`;
      this.node = make("figure", {}, make("figcaption", {}, make("span", { textContent: view.label || "layers down, heads across" }), this.caption), this.map.node);
    }
    show() {
      const row = this.view.layers.findIndex((layer) => layer.layer === state.layer);
      this.map.draw(this.view.layers.length, numHeads, (r, c) => ramp(this.view.layers[r].densities[c]));
      if (row < 0) return;
      this.map.mark(row, state.head);
      this.caption.textContent = this.cell(row, state.head);
    }
  }

  // ---- start ----
  const views = data.views.map((view, number) => new View(view, number));
  const overviews = data.views.map((view) => new Overview(view));
  element("views").append(...views.map((view) => view.node));
  element("overview-maps").append(...overviews.map((overview) => overview.node));
  element("layer").append(...layerNumbers.map((number) => make("option", { value: number, textContent: number })));
  const headNumbers = Array.from({ length: numHeads }, (_, number) => number);
  element("head").append(...headNumbers.map((number) => make("option", { value: number, textContent: number })));
  element("layer").addEventListener("change", (event) => { state.layer = Number(event.target.value); draw(); });
  element("head").addEventListener("change", (event) => { state.head = Number(event.target.value); draw(); });
  element("colour").addEventListener("change", (event) => { state.colour = event.target.value; draw(); });
  for (const [id, by] of [["previous", -1], ["next", 1]]) {
    element(`layer-${id}`).addEventListener("click", () => { state.layer = step(layerNumbers, state.layer, by); draw(); });
    element(`head-${id}`).addEventListener("click", () => { state.head = step(headNumbers, state.head, by); draw(); });
  }
  if (!hasTruth) element("colour-control").hidden = true;
  dark.addEventListener("change", draw);
  addEventListener("keydown", (event) => { if (event.key === "Escape") state.held = null; });
  const first = data.views.findIndex((view) => view.layers.some((layer) => layer.layer === state.layer));
  state.view = first;
  const size = data.views[first].layers.find((layer) => layer.layer === state.layer).block_size;
  const blocks = Math.ceil(data.tokens / size);
  state.query = ((data.focus.block + blocks) % blocks) * size;
  state.held = { view: first, query: state.query, key: 0 };
  draw();
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
})();
