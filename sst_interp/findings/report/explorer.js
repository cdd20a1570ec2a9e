"use strict";
// The explorer: which question, comparison, pair and cell are looked at, and what is said about them. Text from
// data only ever becomes textContent. `explorer(data)` resolves when the first map can be used, to what others may
// ask of it; every move is an event `moved` of the document.
async function explorer(data) {
  const byId = (id) => document.getElementById(id);
  const map = byId("ex-map"), source = explorerData(data);
  const pick = Object.fromEntries(["question", "comparison", "pair", "quantity", "lowest"].map((name) => [name, byId(`ex-${name}`)]));
  const at = { q: 0, position: 0, layer: 0 };
  let now = null, values = null;

  const options = (select, labels, values = labels) => select.replaceChildren(...labels.map((label, i) => el("option", { value: values[i] }, label)));
  const pair = () => now.info.pairs[pick.pair.selectedIndex];
  const pairWords = ([a, b], info = now.info) => `${info.unit} ${a} → ${b}`;
  const length = () => now.info.lengths[at.q];
  const columns = () => Math.max(1, ...now.info.lengths);
  const threshold = () => now.info.threshold === null ? null : 1 - now.info.threshold;
  const name = (i) => `${data.questions[i].index}: ${data.questions[i].id}`;
  const token = (t) => t ? el("code", { class: "token", title: `id ${t.id}` }, t.text.replaceAll(" ", "\u2423")) : "–";

  function viewOf(which, cursor) {
    const v = which === pair() && values ? values : now.map(at.q, which, pick.quantity.value);
    return {
      values: v, P: length(), L: now.L, columns: columns(), layers: now.info.layers, quantity: pick.quantity.value,
      ends: pick.quantity.value === "norm" ? [0, 1] : now.ends(pick.quantity.value), threshold: threshold(), cursor, apart: now.info.differs_from[at.q],
    };
  }

  // Positions of this question from the lowest overlap up, each with its lowest layer.
  function ranked() {
    const all = pick.quantity.value === "overlap" ? values : now.map(at.q, pair(), "overlap"), P = length(), found = [];
    for (let p = 0; p < P; p++) {
      let best = -1;
      for (let l = 0; l < now.L; l++) if (all[l * P + p] > (best < 0 ? -1 : all[best * P + p])) best = l;
      if (best >= 0) found.push({ position: p, layer: best, distance: all[best * P + p] });
    }
    return found.sort((a, b) => b.distance - a.distance || a.position - b.position);
  }

  function drawMap() {
    explorerMap.draw(map, viewOf(pair(), length() ? [at.position, at.layer] : null));
  }

  function answers(correct) {
    const at = (which) => correct.filter(([, right]) => right === which).map(([depth]) => depth).join(", ");
    if (!at(true) || !at(false)) return ` Answer ${at(true) ? "right" : "wrong"} at every depth.`;
    return ` Answer right at depth ${at(true)}, wrong at depth ${at(false)}.`;
  }

  function draw() {
    values = now.map(at.q, pair(), pick.quantity.value);
    at.position = Math.max(0, Math.min(at.position, length() - 1));
    at.layer = Math.max(0, Math.min(at.layer, now.L - 1));
    drawMap();
    const { correct } = data.questions[at.q], [shifted, of] = now.info.shifted[at.q], lead = now.info.pairs[now.info.headline];
    const apart = now.info.differs_from[at.q];
    byId("ex-summary").textContent = (of
      ? `Question ${name(at.q)}, ${now.info.words}: ${shifted.toLocaleString("en")} of ${of.toLocaleString("en")} cells (${(100 * shifted / of).toFixed(1)}%) are below ${Number(Number(now.info.threshold).toPrecision(4))} at ${pairWords(lead)} (${now.info.provenance}).`
      : `Question ${name(at.q)}, ${now.info.words}: no cell in this comparison.`)
      + (typeof apart === "number" ? ` The two texts differ from position ${apart} on (dashed line).` : "")
      + (correct ? answers(correct) : "");
    drawDepths();
    drawText();
    drawCell();
  }

  function drawDepths() {
    byId("ex-depths").replaceChildren(...now.info.pairs.map((which, k) => {
      const canvas = el("canvas", { "aria-hidden": "true" });
      const button = el("button", { type: "button", "aria-pressed": String(k === pick.pair.selectedIndex) }, canvas, el("span", {}, pairWords(which)));
      button.addEventListener("click", () => { pick.pair.selectedIndex = k; draw(); byId("ex-depths").children[k].focus(); });
      return button;
    }));
    now.info.pairs.forEach((which, k) => explorerMap.thumbnail(byId("ex-depths").children[k].firstChild, viewOf(which, null)));
  }

  // The text of the deeper side of the pair, where a run may show it.
  function drawText() {
    const box = byId("ex-text"), shows = data.tokens && now.hasTokens;
    box.hidden = !shows;
    if (!shows) return;
    const spans = [];
    for (let p = 0; p < length(); p++) {
      const t = now.emitted(at.q, p, pair()[1]);
      if (t) spans.push(el("span", { "data-position": p, class: "token" }, t.text.replaceAll(" ", "\u2423")));
    }
    box.replaceChildren(el("strong", {}, now.info.comparison === "teacher_forced" ? "depth 1's text " : `text of ${now.info.unit} ${pair()[1]} `), ...spans);
  }

  function drawCell() {
    drawMap();
    for (const span of byId("ex-text").querySelectorAll("span")) span.toggleAttribute("data-here", Number(span.dataset.position) === at.position);
    const here = length() ? now.cell(at.q, at.layer, at.position, pair()) : null;
    byId("ex-where").textContent = `Position ${at.position}, layer ${now.info.layers[at.layer]}`
      + (here ? `: overlap ${here.overlap} (${pairWords(pair())})` : ": no pair here");
    document.dispatchEvent(new Event("moved"));
    byId("ex-cell").replaceChildren(cellTable(), explorerPlots.profile(now, at, pair(), threshold(), el, pairWords), outputTable(), ...tokens());
  }

  function cellTable() {
    const rows = now.info.pairs.map((which) => {
      const c = now.cell(at.q, at.layer, at.position, which);
      const row = [pairWords(which), c ? c.overlap : "–", c ? side(c.distance) : "–", c && c.l2 ? c.l2 : "–", c ? `${c.normA} → ${c.normB}` : "–"];
      return [which === pair(), row];
    });
    return table("Hidden state of this cell", ["pair", "overlap", "threshold", "relative L2", "norm a → b"], rows, "cell");
  }
  // Two significant digits of 1 - overlap cannot always tell which side of the threshold a cell is on.
  function side(distance) {
    const t = threshold();
    if (t === null) return "–";
    if (Number(t.toPrecision(2)) === Number(distance.toPrecision(2))) return "at it";
    return distance > t ? "below" : "above";
  }

  function outputTable() {
    const yes = (changed) => changed ? "yes" : "no";
    const rows = now.info.pairs.map((which) => {
      const o = now.output(at.q, at.position, which);
      return [which === pair(), [pairWords(which), ...(o ? [yes(o.changed), o.rank, o.replaced, o.kl] : ["–", "–", "–", "–"])]];
    });
    const steps = now.info.states.map((n) => {
      const s = now.step(at.q, at.position, n);
      return [pair().includes(n), [`${now.info.unit} ${n}`, s ? s.entropy : "–", s ? s.margin : "–"]];
    });
    return el("div", {},
      table("Output at this position", ["pair", "new argmax", "from rank", "top-100 replaced", "KL, nats"], rows, "output"),
      table("Output distribution", [now.info.unit, "entropy, nats", "margin, logits"], steps, "steps"));
  }

  function tokens() {
    if (!data.tokens) return [el("p", { class: "hint" }, "This dataset's text must not be published: the run keeps no tokens, only numbers.")];
    if (!now.hasTokens) return [el("p", { class: "hint" }, "This run recorded no token ids.")];
    const [a, b] = pair(), before = now.top(at.q, at.position, a), after = now.top(at.q, at.position, b);
    const moved = (which, words) => {
      const list = now.moved(which, at.q, at.position, pair());
      return el("p", {}, el("strong", {}, words), ...(list.length ? list.flatMap((t) => [token(t), ` ${t.rank - 1}  `]) : ["none"]));
    };
    const read = now.emitted(at.q, at.position - 1, b);
    return [
      at.position ? el("p", {}, "Reads ", token(read), ", emits ", token(now.emitted(at.q, at.position, b)), ".") : el("p", {}, "Reads the last prompt token, emits ", token(now.emitted(at.q, at.position, b)), "."),
      ...lens(a, b),
      tokenTable("Top tokens of the output, after the last layer", a, b, before, after, "tokens"),
      moved("entered", "Entered the top 100 (new rank): "), moved("left", "Left it (old rank): "),
    ];
  }

  function lens(a, b) {
    const [before, after] = [a, b].map((n) => now.lens(at.q, at.position, at.layer, n));
    if ([before, after].includes("left out")) return [el("p", { class: "hint", id: "ex-lens" }, data.lens.left_out)];
    if (!before && !after) return [el("p", { class: "hint", id: "ex-lens" }, data.lens.missing)];
    return [tokenTable(`Logit lens of layer ${now.info.layers[at.layer]}: top tokens if it were the last`, a, b, before || [], after || [], "lens")];
  }

  function tokenTable(caption, a, b, before, after, id) {
    const rows = Array.from({ length: Math.max(before.length, after.length) }, (_, k) => [false, [k, token(before[k]), token(after[k])]]);
    return table(`${caption}${data.tokens.known ? "" : " (ids: no tokenizer at hand)"}`, ["rank", `${now.info.unit} ${a}`, `${now.info.unit} ${b}`], rows, id);
  }

  function table(caption, head, rows, id) {
    const body = rows.map(([chosen, row]) => el("tr", { class: chosen ? "chosen" : null },
      el("th", { scope: "row" }, String(row[0])), ...row.slice(1).map((x) => el("td", {}, x instanceof Node ? x : String(x)))));
    return el("div", { class: "scroll" }, el("table", { id: `ex-table-${id}` }, el("caption", {}, caption),
      el("thead", {}, el("tr", {}, ...head.map((h) => el("th", { scope: "col" }, h)))), el("tbody", {}, ...body)));
  }

  function go(position, layer) {
    at.position = Math.max(0, Math.min(length() - 1, position));
    at.layer = Math.max(0, Math.min(now.L - 1, layer));
    drawCell();
  }
  function jump(by) {
    const all = ranked();
    if (!all.length) return;
    const here = all.findIndex((r) => r.position === at.position && r.layer === at.layer);
    const next = all[here < 0 ? 0 : (here + by + all.length) % all.length];
    go(next.position, next.layer);
  }
  function question(index) {
    const n = data.questions.length;
    at.q = (index + n) % n;
    pick.question.selectedIndex = at.q;
    draw();
  }
  async function comparison(index) {
    const words = now && pairWords(pair());
    now = await source.open(index);
    options(pick.pair, now.info.pairs.map((which) => pairWords(which)));
    const same = now.info.pairs.findIndex((which) => pairWords(which) === words);
    pick.pair.selectedIndex = same < 0 ? now.info.headline : same;
    options(pick.lowest, ["choose one to go there", ...now.info.lowest.map(([q, p, layer]) => `${name(q)}, position ${p}, layer ${layer}`)]);
    draw();
  }

  const keys = {
    ArrowLeft: () => go(at.position - 1, at.layer), ArrowRight: () => go(at.position + 1, at.layer),
    ArrowUp: () => go(at.position, at.layer + 1), ArrowDown: () => go(at.position, at.layer - 1),
    Home: () => go(0, at.layer), End: () => go(length() - 1, at.layer), n: () => jump(1), p: () => jump(-1),
    d: () => { pick.pair.selectedIndex = (pick.pair.selectedIndex + 1) % now.info.pairs.length; draw(); },
    PageUp: () => question(at.q - 1), PageDown: () => question(at.q + 1), Enter: () => byId("ex-detail").focus(),
  };
  map.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey || !Object.hasOwn(keys, event.key)) return;
    event.preventDefault();
    keys[event.key]();
  });
  byId("ex-detail").addEventListener("keydown", (event) => { if (event.key === "Escape") map.focus(); });
  map.addEventListener("click", (event) => {
    const cell = explorerMap.hit(map, event, columns(), now.L);
    if (cell && cell[0] < length()) go(...cell);
  });
  byId("ex-text").addEventListener("click", (event) => { if (event.target.dataset.position) go(Number(event.target.dataset.position), at.layer); });
  byId("ex-previous").addEventListener("click", () => question(at.q - 1));
  byId("ex-next").addEventListener("click", () => question(at.q + 1));
  byId("ex-next-shift").addEventListener("click", () => jump(1));
  pick.question.addEventListener("change", () => question(pick.question.selectedIndex));
  pick.comparison.addEventListener("change", () => comparison(pick.comparison.selectedIndex));
  pick.pair.addEventListener("change", draw);
  pick.quantity.addEventListener("change", draw);
  pick.lowest.addEventListener("change", () => {
    const [q, p, layer] = now.info.lowest[pick.lowest.selectedIndex - 1] || [];
    if (q === undefined) return;
    pick.pair.selectedIndex = now.info.headline;
    Object.assign(at, { position: p, layer: now.info.layers.indexOf(layer) });
    question(q);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  let width = 0;
  new ResizeObserver(() => { if (now && map.clientWidth !== width) { width = map.clientWidth; draw(); } }).observe(map);

  byId("explorer").hidden = false;
  options(pick.question, data.questions.map((_, i) => name(i)));
  options(pick.comparison, data.comparisons.map((c) => c.words), data.comparisons.map((c) => c.comparison));
  const first = Math.max(0, data.comparisons.findIndex((c) => c.comparison === data.lead));
  pick.comparison.selectedIndex = first;
  await comparison(first);
  jump(1);

  // Where the reader is, in the numbers of the run's tables, and the way back there.
  const where = () => ({
    q: data.questions[at.q].index, c: now.info.comparison, pair: pair().join("-"), layer: now.info.layers[at.layer], pos: at.position,
  });
  async function visit(to) {
    const index = data.comparisons.findIndex((c) => c.comparison === to.c);
    if (index >= 0 && data.comparisons[index] !== now.info) {
      pick.comparison.selectedIndex = index;
      await comparison(index);
    }
    const which = now.info.pairs.findIndex((ab) => ab.join("-") === to.pair), q = data.questions.findIndex(({ index }) => String(index) === String(to.q));
    if (q < 0) return false;
    if (which >= 0) pick.pair.selectedIndex = which;
    const layer = now.info.layers.findIndex((l) => String(l) === String(to.layer));
    Object.assign(at, { q, position: Number(to.pos) || 0, layer: Math.max(0, layer) });
    question(q);
    if (to.pos === undefined || to.pos === null) jump(1);
    return true;
  }
  return { data, source, where, visit, view: (which = pair()) => viewOf(which, length() ? [at.position, at.layer] : null), pair, at, token, now: () => now, table };
}
