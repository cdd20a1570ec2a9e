// The list of questions: sorted by a column, filtered by what happened to the answer; a click goes to the question.
function questionList(explorer) {
  const { data } = explorer, byId = (id) => document.getElementById(id);
  const lead = data.comparisons.find((c) => c.comparison === data.lead) || data.comparisons[0];
  const free = data.comparisons.find((c) => c.comparison === "free_running");
  const rows = data.questions.map((question, i) => {
    const correct = question.correct || [], first = correct[0]?.[1], last = correct.at(-1)?.[1], [shifted, of] = lead.shifted[i];
    return {
      ...question, i, correct, broken: first === true && last === false, mended: first === false && last === true,
      layers: of ? shifted / of * lead.layers.length : NaN, parts: free?.parts[i] ?? NaN, score: question.score ?? NaN,
      right: correct.filter(([, c]) => c).length,
    };
  });
  const kinds = {
    "all questions": () => true,
    broken: (r) => r.broken,
    mended: (r) => r.mended,
    "answer changed": (r) => r.changed,
    "right at every depth": (r) => r.correct.length && r.right === r.correct.length,
    "wrong at every depth": (r) => r.correct.length && !r.right,
    "texts part": (r) => !Number.isNaN(r.parts),
  };
  const depths = rows.find((r) => r.correct.length)?.correct.map(([d]) => d) || [];
  const columns = [
    ["question", (r) => r.i, (r) => el("a", { href: `#q=${r.index}` }, `${r.index}: ${r.id}`), 1],
    ["outcome", (r) => r.broken ? 0 : r.mended ? 1 : r.changed ? 2 : 3, (r) => r.broken ? "✗ broken" : r.mended ? "✓ mended" : r.changed ? "≠ answer changed" : "= same", 1],
    ...(rows.some((r) => r.gold !== undefined) ? [["right answer", (r) => r.gold ?? "", (r) => r.gold ?? "–", 1]] : []),
    ...depths.map((d, k) => [`depth ${d}`, (r) => r.correct[k]?.[1] ? 0 : 1, (r) => answer(r, k), 1]),
    ["layers shifted", (r) => r.layers, (r) => number(r.layers, 1), -1],
    ...(free ? [["texts part at", (r) => r.parts, (r) => number(r.parts, 0), 1]] : []),
    ...(rows.some((r) => !Number.isNaN(r.score)) ? [["probe score", (r) => r.score, (r) => number(r.score, 2), -1]] : []),
  ];
  const number = (x, digits) => Number.isNaN(x) ? "–" : x.toFixed(digits);
  const answer = (r, k) => {
    const right = r.correct[k]?.[1];
    return right === undefined ? "–" : el("span", { class: right ? "right" : "wrong" }, `${right ? "✓" : "✗"} ${r.answers ? r.answers[k] ?? "none" : right ? "right" : "wrong"}`);
  };
  let by = 0, way = 1;
  const titles = { "layers shifted": `Mean number of layers below the threshold at a position, of ${lead.layers.length} (${lead.words})`, "texts part at": "Position of the first token that differs between depth 1 and the deepest", "probe score": "Of the probe of position 0: above 0 is a yes; from folds it was not trained on" };
  const heads = columns.map(([name, , , start], k) => {
    const button = el("button", { type: "button", title: titles[name] }, name);
    button.addEventListener("click", () => { way = by === k ? -way : start; by = k; fill(); });
    return el("th", { scope: "col" }, button);
  });
  const body = el("tbody"), select = byId("list-kind");
  byId("list-table").append(el("caption", { class: "for-ears" }, "Questions; a heading sorts by its column"), el("thead", {}, el("tr", {}, ...heads)), body);

  function fill() {
    const text = byId("list-id").value.trim().toLowerCase(), of = columns[by][1];
    const shown = rows.filter((r) => kinds[select.value](r) && `${r.index}: ${r.id}`.toLowerCase().includes(text));
    const order = (x, y) => Number.isNaN(x) || Number.isNaN(y) ? Number.isNaN(x) - Number.isNaN(y) : way * (x < y ? -1 : x > y ? 1 : 0);
    shown.sort((r, s) => order(of(r), of(s)) || r.i - s.i);
    body.replaceChildren(...shown.map((r) => {
      const [head, ...cells] = columns.map(([, , show]) => show(r));
      const row = el("tr", { "data-q": r.index }, el("th", { scope: "row" }, head), ...cells.map((cell) => el("td", {}, cell)));
      row.addEventListener("click", (event) => { if (!event.target.closest("a")) location.hash = `q=${r.index}`; });
      return row;
    }));
    heads.forEach((th, k) => { if (k === by) th.setAttribute("aria-sort", way > 0 ? "ascending" : "descending"); else th.removeAttribute("aria-sort"); });
    byId("list-count").textContent = `${shown.length} of ${rows.length} questions`;
    mark();
  }
  function mark() {
    const here = String(explorer.where().q);
    for (const row of body.rows) row.classList.toggle("chosen", row.dataset.q === here);
  }
  select.append(...Object.entries(kinds).map(([name, test]) => el("option", { value: name }, `${name} (${rows.filter(test).length})`)));
  select.addEventListener("change", fill);
  byId("list-id").addEventListener("input", fill);
  document.addEventListener("moved", mark);
  byId("list").hidden = false;
  fill();
}
