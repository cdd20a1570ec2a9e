// A second run at the explorer's question and comparison: both maps at one scale, and their ratio.
function compare(explorer, beside) {
  const { data, view, pair, at } = explorer, other = explorerData(beside.explorer), byId = (id) => document.getElementById(id);
  const same = new Map(beside.explorer.questions.map(({ id }, i) => [id, i]));

  async function draw() {
    const name = explorer.now().info.comparison, own = { ...view(), quantity: "overlap", ends: explorer.now().ends("overlap"), values: explorer.now().map(at.q, pair(), "overlap") };
    const index = beside.explorer.comparisons.findIndex((c) => c.comparison === name), q = same.get(data.questions[at.q].id);
    const [A, B, D] = ["a", "b", "d"].map((k) => byId(`beside-${k}`));
    explorerMap.draw(A, own);
    const missing = index < 0 ? "B has no such comparison." : q === undefined ? "B was not asked this question, or it is not in this file." : "";
    [B, D].forEach((canvas) => { canvas.hidden = Boolean(missing); });
    if (missing) { byId("beside-where").textContent = missing; return; }
    const now = await other.open(index), { info } = now, wanted = pair().join("-");
    const which = info.pairs.find((ab) => ab.join("-") === wanted) || info.pairs[info.headline];
    const theirs = { ...own, values: now.map(q, which, "overlap"), P: info.lengths[q], L: now.L, layers: info.layers, threshold: info.threshold === null ? null : 1 - info.threshold, apart: info.differs_from[q], columns: Math.max(own.columns, info.lengths[q]) };
    explorerMap.draw(B, theirs);
    const fits = now.L === own.L, P = Math.min(own.P, theirs.P), values = new Float64Array(own.L * own.P).fill(NaN);
    D.hidden = !fits;
    if (fits) {
      for (let l = 0; l < own.L; l++) for (let p = 0; p < P; p++) values[l * own.P + p] = Math.log10(Math.max(theirs.values[l * theirs.P + p], 1e-7) / Math.max(own.values[l * own.P + p], 1e-7));
      explorerMap.draw(D, { ...own, values, quantity: "difference", threshold: null, apart: null });
    }
    const [p, l] = own.cursor || [0, 0], far = (v) => { const d = v.values[l * v.P + p]; return p < v.P && l < v.L && !Number.isNaN(d) ? String(Number((1 - d).toFixed(7))) : "none"; };
    byId("beside-where").textContent = `Question ${data.questions[at.q].index}, ${info.words}, position ${p}, layer ${own.layers[l]}: overlap ${far(own)} in A (${pair().join(" → ")}), ${far(theirs)} in B (${which.join(" → ")}).`
      + (fits ? "" : " The runs have different numbers of layers: there is no difference map.");
  }
  document.addEventListener("moved", draw);
  new ResizeObserver(draw).observe(byId("beside"));
  draw();
}
