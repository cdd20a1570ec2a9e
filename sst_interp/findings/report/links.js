// A fragment opens what it names: a cell (#q=12&c=within&pair=1-4&layer=7&pos=0), a claim, a figure. And copying: the
// link, or the Python that gives the same number.
const links = (() => {
  const byId = (id) => document.getElementById(id);
  const read = () => Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const said = (words) => { byId("copied").textContent = words; setTimeout(() => { byId("copied").textContent = ""; }, 4000); };
  const literal = (text) => JSON.stringify(String(text));  // a JSON text is a Python text

  async function copy(text, what) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {  // no clipboard in a sandboxed frame or on an older page
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      const done = document.execCommand("copy");
      area.remove();
      if (!done) return said(text);
    }
    said(`${what} copied`);
  }

  const cell = (where) => new URLSearchParams(where).toString();

  function python(place, name, where) {
    const start = "import sst_interp as sst\n";
    if (place === "cell") {
      const { q, c, pair, layer, pos } = where, [a, b] = pair.split("-");
      return `${start}\nrun = sst.open_run(${literal(name)})\nrows = run.table("pairs", comparison=${literal(c)}, questions=[${q}])\n`
        + `print(rows.query("position == ${pos} and layer == ${layer} and a == ${a} and b == ${b}").T)\n`;
    }
    const ledger = `${start}from sst_interp.findings.of_run import ledger_of\n\nledger = ledger_of(sst.open_run(${literal(name)}))\n`;
    const rest = place.slice(place.indexOf("=") + 1);
    if (place.startsWith("claim=")) return `${ledger}print(ledger.table.set_index("claim").loc[${literal(rest)}])\n`;
    const at = rest.lastIndexOf(".");
    return `${ledger}result = ledger.results[${literal(rest.slice(0, at))}]\nprint(result.table)\nresult.figures()[${literal(rest.slice(at + 1))}].show()\n`;
  }

  // `open`: what shows a claim or a figure; `explorer`: null where there is nothing to explore.
  function start(name, explorer, open) {
    const place = (of) => of === "cell" ? cell(explorer.where()) : of;
    for (const box of document.querySelectorAll(".copies")) box.hidden = box.querySelector("[data-link=cell]") !== null && !explorer;
    document.addEventListener("click", (event) => {
      const button = event.target.closest("[data-link], [data-python]");
      if (!button) return;
      if (button.dataset.link) copy(`${location.href.split("#")[0]}#${place(button.dataset.link).replace(/ /g, "%20")}`, "Link");
      else copy(python(button.dataset.python, name, explorer && explorer.where()), "Python");
    });
    async function follow(move) {
      const to = read();
      if (to.q === undefined || !explorer) return move && open(to);
      if (await explorer.visit(to) && move) byId("explorer-h").scrollIntoView();
    }
    addEventListener("hashchange", () => follow(true));
    // A page that reloads stays where it is; the address changes once the reader moves.
    const again = performance.getEntriesByType("navigation")[0]?.type === "reload";
    return follow(!again).then(() => {
      let last = explorer && cell(explorer.where());
      if (explorer) document.addEventListener("moved", () => {
        const now = cell(explorer.where());
        if (now === last) return;
        last = now;
        try { history.replaceState(null, "", `#${now}`); } catch { /* a frame without an address */ }
      });
    });
  }

  return { start, copy, python };
})();
