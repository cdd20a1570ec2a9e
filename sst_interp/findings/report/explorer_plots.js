"use strict";
// A small drawing beside a cell: overlap over the layers of its position, a line per pair that begins at 1.
const explorerPlots = (() => {
  const W = 420, H = 170, LEFT = 46, RIGHT = 10, TOP = 10, BOTTOM = 34;
  const COLOURS = ["#56b4e9", "#e69f00", "#009e73", "#cc79a7"], DASHES = ["6 4", "2 3", "", "8 3 2 3"];
  const node = (tag, attributes, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };

  function profile(now, at, chosen, threshold, el, words) {
    const low = -4, high = 0.3, L = now.L, P = now.info.lengths[at.q];
    const x = (l) => LEFT + (L > 1 ? l / (L - 1) : 0.5) * (W - LEFT - RIGHT);
    const y = (d) => TOP + (Math.min(high, Math.max(low, Math.log10(Math.max(d, 1e-9)))) - low) / (high - low) * (H - TOP - BOTTOM);
    const svg = node("svg", { viewBox: `0 0 ${W} ${H}`, class: "profile", role: "img", "aria-label": `Overlap over the layers at position ${at.position}` });
    for (const d of [0.001, 0.01, 0.1, 1]) {
      svg.append(node("line", { x1: LEFT, x2: W - RIGHT, y1: y(d), y2: y(d), class: "grid" }),
        node("text", { x: LEFT - 6, y: y(d) + 4, "text-anchor": "end" }, String(Number((1 - d).toFixed(3)))));
    }
    if (threshold !== null) svg.append(node("line", { x1: LEFT, x2: W - RIGHT, y1: y(threshold), y2: y(threshold), class: "threshold" }));
    svg.append(node("line", { x1: x(at.layer), x2: x(at.layer), y1: TOP, y2: H - BOTTOM, class: "here" }));
    const shown = now.info.pairs.filter(([a]) => a === chosen[0]);
    shown.forEach((which, k) => {
      const all = now.map(at.q, which, "overlap"), points = [];
      for (let l = 0; l < L; l++) if (!Number.isNaN(all[l * P + at.position])) points.push(`${x(l).toFixed(1)},${y(all[l * P + at.position]).toFixed(1)}`);
      svg.append(node("polyline", { points: points.join(" "), class: "ex-line", stroke: COLOURS[k % 4], "stroke-dasharray": DASHES[k % 4], "stroke-width": which === chosen ? 3 : 1.7 }));
    });
    for (let l = 0; l < L; l += Math.max(1, Math.round(L / 6))) svg.append(node("text", { x: x(l), y: H - BOTTOM + 15, "text-anchor": "middle" }, now.info.layers[l]));
    svg.append(node("text", { x: (LEFT + W - RIGHT) / 2, y: H - 3, "text-anchor": "middle" }, "layer"));
    const key = el("p", { class: "key" }, ...shown.map((which, k) => {
      const mark = node("svg", { viewBox: "0 0 26 8", width: 26, height: 8, "aria-hidden": "true" });
      mark.append(node("line", { x1: 0, x2: 26, y1: 4, y2: 4, class: "ex-line", stroke: COLOURS[k % 4], "stroke-dasharray": DASHES[k % 4], "stroke-width": 2.5 }));
      return el("span", {}, mark, ` ${words(which)}`);
    }));
    return el("figure", {}, el("figcaption", {}, "Overlap over the layers of this position (1 is at the top; dashed: the threshold)"), svg, key);
  }

  return { profile };
})();
