// The report: figures when they come into view, the switch between comparisons, downloads, the ledger's details.
(async () => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const narrow = () => window.innerWidth < 640;
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const dark = matchMedia("(prefers-color-scheme: dark)");

  // What needs no data: the ledger's details, and which comparison is shown.
  const claims = all(".claim-more");
  const open = (button, on) => {
    button.setAttribute("aria-expanded", String(on));
    byId(button.getAttribute("aria-controls")).hidden = !on;
  };
  claims.forEach((button) => {
    open(button, false);
    button.addEventListener("click", () => open(button, button.getAttribute("aria-expanded") !== "true"));
  });
  const index = document.querySelector(".index"), wide = matchMedia("(min-width: 75rem)");
  const unfold = () => { index.open = wide.matches; };
  unfold();
  wide.addEventListener("change", unfold);
  if (claims.length) byId("all-claims").hidden = false;
  byId("all-claims")?.addEventListener("click", (event) => {
    const on = claims.some((button) => button.getAttribute("aria-expanded") !== "true");
    claims.forEach((button) => open(button, on));
    event.target.textContent = on ? "Close all claims" : "Open all claims";
  });

  let shown = all(".switch button")[0]?.dataset.comparison;
  function choose(comparison) {
    shown = comparison;
    all(".switch button").forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.comparison === shown)));
    all("[data-panel]").forEach((panel) => { panel.hidden = panel.dataset.panel !== shown; });
    drawVisible();
  }
  all(".switch button").forEach((button) => button.addEventListener("click", () => {
    const before = button.getBoundingClientRect().top;
    choose(button.dataset.comparison);
    window.scrollBy(0, button.getBoundingClientRect().top - before);  // what was clicked stays where it was
  }));

  // Figures. Okabe and Ito's blue is too dark for a dark page; their sky blue is not.
  let figures = null;
  const drawn = new Map(), visible = new Set();
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };
  const figureOf = (plot) => plot.dataset.figure || plot.getAttribute(`data-figure-${shown}`);
  function themed(layout, height) {
    const ink = css("--soft"), grid = css("--grid"), out = { ...layout, height, font: { ...(layout.font || {}), color: ink, size: narrow() ? 11 : 12.5 } };
    for (const axis of Object.keys(layout).filter((k) => /^[xy]axis/.test(k))) out[axis] = { ...layout[axis], gridcolor: grid, linecolor: ink };
    for (const axis of ["xaxis", "yaxis"]) {
      out[axis] = out[axis] || { gridcolor: grid, linecolor: ink };
      if (out[axis].title) out[axis].title = { ...out[axis].title, font: { size: out.font.size, color: ink }, standoff: 8 };
    }
    out.margin = { ...(layout.margin || {}), t: 36, r: 14, l: 46, b: 48 };
    if (narrow()) out.dragmode = false;  // a finger that scrolls the page must not zoom a figure
    return out;
  }
  // Colour bars say their title along themselves, in the size of everything else.
  const slim = (trace) => trace.colorbar ? { ...trace, colorbar: { ...trace.colorbar, thickness: 10, title: { ...trace.colorbar.title, font: { size: 12 } } } } : trace;
  function draw(plot) {
    if (!figures || !window.Plotly) return;
    const id = figureOf(plot), key = `${id} ${dark.matches} ${narrow()}`;
    if (drawn.get(plot) === key) return;
    drawn.set(plot, key);
    if (!id || !figures[id]) { Plotly.purge(plot); return; }
    const figure = JSON.parse(dark.matches ? JSON.stringify(figures[id]).replaceAll("#0072B2", "#56B4E9") : JSON.stringify(figures[id]));
    Plotly.react(plot, figure.data.map(slim), themed(figure.layout, Number(plot.dataset.height)), config);
  }
  const drawVisible = () => visible.forEach((plot) => { if (plot.offsetParent) draw(plot); });
  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) if (isIntersecting) visible.add(target); else visible.delete(target);
    drawVisible();
  }, { rootMargin: "300px" });
  all(".plot").forEach((plot) => { plot.style.minHeight = `${plot.dataset.height}px`; seen.observe(plot); });
  dark.addEventListener("change", drawVisible);
  window.addEventListener("resize", drawVisible);
  window.addEventListener("beforeprint", () => all(".plot").forEach((plot) => { if (plot.offsetParent) draw(plot); }));
  if (shown) choose(shown);

  if (!pack.supported) {
    byId("too-old").hidden = false;
    document.documentElement.dataset.ready = "no";
    return;
  }

  // Downloads.
  let tables = null;
  all(".csv").forEach((button) => {
    button.hidden = false;
    button.addEventListener("click", async () => {
      tables = tables || JSON.parse(await pack.text(data.tables));
      const { name, text } = tables[button.dataset.table], link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
      link.download = `${name}.csv`;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    });
  });

  // A claim or a figure that a fragment names: opened, in its comparison, in view.
  function show({ claim, figure }) {
    if (claim !== undefined) {
      const row = all("[data-claim]").find((body) => body.dataset.claim === claim), button = row?.querySelector(".claim-more");
      if (!button) return;
      open(button, true);
      row.scrollIntoView();
      button.focus({ preventScroll: true });
    } else if (figure !== undefined) {
      const plot = all("[data-key]").find((one) => one.dataset.key === figure);
      if (!plot) return;
      const panel = plot.closest("[data-panel]");
      if (panel) choose(panel.dataset.panel);
      for (let up = plot.closest("details"); up; up = up.parentElement.closest("details")) up.open = true;
      plot.closest("figure").scrollIntoView();
    } else if (location.hash) {
      const there = byId(decodeURIComponent(location.hash.slice(1)));
      const folded = there?.querySelector("details") || there?.closest("details");
      if (there?.closest("#untestable")) folded.open = true;
    }
  }

  if (data.explorer.left_out) byId("ex-left-out").textContent = `The first ${data.explorer.questions.length} questions are in this file; run.question(id) shows the other ${data.explorer.left_out}.`;
  let ex = null;
  if (data.explorer.comparisons.length) ex = await explorer(data.explorer);
  else byId("ex-left-out").textContent = "No comparison of this run has pairs to draw.";
  if (ex) {
    questionList(ex);
    whatChanged(ex);
    if (data.beside) compare(ex, data.beside);
  }
  notes(data, ex);
  await links.start(data.name, ex, show);
  document.documentElement.dataset.explorer = "yes";
  // A page from `sst-interp view` asks whether there is more to see. A reader who writes is left alone.
  if (data.live !== null) setInterval(async () => {
    const answer = await fetch("version").then((r) => r.text()).catch(() => data.live);
    if (answer !== data.live && !["TEXTAREA", "INPUT", "SELECT"].includes(document.activeElement?.tagName)) location.reload();
  }, 2000);

  const [script, json] = await Promise.all([pack.text(data.plotly), pack.text(data.figures)]);
  const element = document.createElement("script");
  element.textContent = script;  // the page's policy admits exactly this text
  document.head.append(element);
  figures = JSON.parse(json);
  drawVisible();
  document.documentElement.dataset.ready = "yes";
})();
