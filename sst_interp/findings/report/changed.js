// What changed in a question: the two texts beside each other, and the output at the first token that differs, by
// iteration. Without texts (a restricted run) the same numbers.
function whatChanged(explorer) {
  const { data, token, table, source, at } = explorer, box = document.getElementById("changed-body");
  const find = (name) => data.comparisons.findIndex((c) => c.comparison === name);
  const FREE = find("free_running"), WITHIN = find("within"), SHOWN = 5;
  let drawn = -1;
  if (FREE < 0) return;
  document.getElementById("changed").hidden = false;

  // Longest common subsequence: pairs [a, b] of tokens, either of which may be missing.
  function aligned(a, b) {
    const same = (i, j) => a[i].id === b[j].id, size = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
    for (let i = a.length - 1; i >= 0; i--) for (let j = b.length - 1; j >= 0; j--) size[i][j] = same(i, j) ? 1 + size[i + 1][j + 1] : Math.max(size[i + 1][j], size[i][j + 1]);
    const out = [];
    let i = 0, j = 0;
    while (i < a.length || j < b.length) {
      if (i < a.length && j < b.length && same(i, j)) out.push([a[i++], b[j++]]);
      else if (i < a.length && j < b.length && size[i + 1][j] === size[i][j + 1] && size[i + 1][j + 1] === size[i][j]) out.push([a[i++], b[j++]]);
      else if (j >= b.length || (i < a.length && size[i + 1][j] >= size[i][j + 1])) out.push([a[i++], null]);
      else out.push([null, b[j++]]);
    }
    return out;
  }

  function texts(free, [a, b], q) {
    const read = (n) => Array.from({ length: free.info.lengths[q] }, (_, p) => free.emitted(q, p, n)).filter(Boolean);
    const rows = aligned(read(a), read(b));
    let first = true;
    const columns = rows.map(([one, two]) => {
      const differs = one?.id !== two?.id, mark = differs && first;
      if (differs) first = false;
      return el("span", { class: `both-tokens${differs ? " differs" : ""}${mark ? " first" : ""}` }, ...[one, two].map((t) => el("span", { class: "token" }, t ? t.text.replaceAll(" ", "\u2423") : "·")));
    });
    const whole = (n) => el("p", { class: "for-ears" }, `Text of depth ${n}: ${read(n).map((t) => t.text).join("")}`);
    return [whole(a), whole(b), el("p", { class: "hint" }, `Above: depth ${a}; below: depth ${b}. Tokens that differ are underlined, the first one is framed; · is a token that the other text lacks.`),
      el("div", { class: "aligned", "aria-hidden": "true" }, ...columns)];
  }

  function byIteration(within, q, p) {
    const states = within.info.states, rows = [];
    for (let k = 0; within.hasTokens && k < SHOWN; k++) rows.push([false, [`${k + 1}.`, ...states.map((n) => token(within.top(q, p, n)[k]))]]);
    const said = (what) => states.map((n) => within.step(q, p, n)?.[what] ?? "–");
    rows.push([false, ["entropy, nats", ...said("entropy")]], [false, ["margin, logits", ...said("margin")]]);
    return table(`Output at position ${p}, after the last layer, by iteration`, ["", ...states.map((n) => `iteration ${n}`)], rows, "changed");
  }

  function lens(within, q, p) {
    const states = within.info.states, by = states.map((n) => within.lens(q, p, at.layer, n));
    if (!data.tokens || by.includes("left out") || !by.some(Boolean)) return [];
    const rows = Array.from({ length: SHOWN }, (_, k) => [false, [`${k + 1}.`, ...by.map((top) => token((top || [])[k]))]]);
    return [table(`Logit lens of layer ${within.info.layers[at.layer]} at position ${p}, by iteration`, ["", ...states.map((n) => `iteration ${n}`)], rows, "changed-lens")];
  }

  async function draw() {
    const q = at.q, free = await source.open(FREE), within = WITHIN < 0 ? null : await source.open(WITHIN);
    if (q !== at.q) return;
    const pair = free.info.pairs[free.info.headline], p = free.info.parts[q], depths = free.info.states;
    const words = p === null || p === undefined
      ? `The texts of depth ${pair[0]} and ${pair[1]} do not differ in the ${free.info.lengths[q]} positions that both have.`
      : `The texts of depth ${pair[0]} and ${pair[1]} part at position ${p}.`;
    const there = p ?? 0, numbers = depths.map((n) => {
      const s = free.step(q, there, n);
      return [pair.includes(n), [`depth ${n}`, s ? s.entropy : "–", s ? s.margin : "–"]];
    });
    const o = free.output(q, there, pair);
    box.replaceChildren(
      el("p", {}, words, o ? ` At position ${there} the argmax ${o.changed ? `changes: the new one had rank ${o.rank}` : "stays"}; ${o.replaced} of the top 100 are replaced; KL ${o.kl} nats.` : ""),
      ...(free.hasTokens && data.tokens ? texts(free, pair, q) : [el("p", { class: "hint" }, data.tokens ? "This run recorded no token ids." : "The texts are restricted and are not shown.")]),
      el("div", { class: "changed-tables ex-detail" },
        table(`Each depth's output at position ${there}`, ["", "entropy, nats", "margin, logits"], numbers, "parting"),
        ...(within ? [byIteration(within, q, there), ...lens(within, q, there)] : [])));
  }
  let layer = -1;
  const redraw = () => { if (drawn !== at.q || layer !== at.layer) { drawn = at.q; layer = at.layer; draw(); } };
  document.addEventListener("moved", redraw);
  redraw();
}
