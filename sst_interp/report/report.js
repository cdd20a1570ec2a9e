"use strict";
// Draws the figures and the per-question heat map from the JSON in #data. Text from data only ever
// becomes textContent: plotly reads a little HTML in its labels, so no name is handed to it.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const narrow = () => window.innerWidth < 640;
  const css = (name) => getComputedStyle(document.body).getPropertyValue(name).trim();
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"] };

  function themed(layout) {
    const ink = css("--soft"), grid = css("--grid");
    const out = { ...layout, font: { family: css("font-family"), ...(layout.font || {}), color: ink, size: narrow() ? 12 : 13 } };
    for (const axis of ["xaxis", "yaxis"]) {
      out[axis] = { ...(layout[axis] || {}), gridcolor: grid, linecolor: ink };
    }
    // A finger that scrolls the page must not zoom a figure.
    if (narrow()) out.dragmode = false;
    return out;
  }

  // Okabe and Ito's blue is too dark for a dark page; their sky blue is not.
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coloured = (traces) => dark.matches ? JSON.parse(JSON.stringify(traces).replaceAll("#0072B2", "#56B4E9")) : traces;

  function drawAll() {
    for (const [id, plot] of Object.entries(data.plots)) {
      if (byId(id)) Plotly.react(byId(id), coloured(plot.data), themed(plot.layout), config);
    }
    if (data.maps.maps.length) drawMap();
  }

  function bytes(text) {
    return Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  }

  const decoded = new Map();
  function cells(map, quantity) {
    const key = map.comparison + quantity;
    if (!decoded.has(key)) decoded.set(key, bytes(map[quantity]));
    return decoded.get(key);
  }

  // Byte -> v = log(1 - overlap + r), or log2 of the norm ratio; 0 is "no pair".
  function scale(map, quantity) {
    const [low, high] = quantity === "overlap" ? map.v : [-data.maps.log2_ratio, data.maps.log2_ratio];
    return (byte) => low + (byte - 1) / 254 * (high - low);
  }
  const overlapOf = (map, v) => 1 + map.resolution - Math.exp(v);
  const vOf = (map, overlap) => Math.log(1 - overlap + map.resolution);
  const shown = (x) => x > 0.99 ? x.toFixed(4) : x.toFixed(2);

  const pick = { question: byId("pick-question"), comparison: byId("pick-comparison"), quantity: byId("pick-quantity") };

  function drawMap() {
    const index = pick.question.selectedIndex, map = data.maps.maps[pick.comparison.selectedIndex];
    const quantity = pick.quantity.value, all = cells(map, quantity), value = scale(map, quantity);
    const overlap = cells(map, "overlap"), toV = scale(map, "overlap");
    const P = map.positions.length, L = map.layers.length, start = index * P * L;
    const z = [], text = [];
    let pairs = 0, shifted = 0, lowest = Infinity, at = "";
    for (let l = 0; l < L; l++) {
      const row = [], words = [];
      for (let p = 0; p < P; p++) {
        const byte = all[start + l * P + p], near = overlap[start + l * P + p];
        const where = `position ${map.positions[p]}, layer ${map.layers[l]}`;
        if (near) {
          const o = overlapOf(map, toV(near));
          pairs += 1;
          if (o < map.threshold) shifted += 1;
          if (o < lowest) { lowest = o; at = where; }
        }
        const x = value(byte);
        row.push(byte ? (quantity === "overlap" ? -x : x) : null);
        words.push(byte ? `${where}<br>${quantity === "overlap"
          ? "overlap about " + shown(overlapOf(map, x)) : "norm b / norm a about " + (2 ** x).toFixed(2)}` : where + "<br>no pair");
      }
      z.push(row);
      text.push(words);
    }
    const trace = { type: "heatmap", x: map.positions, y: map.layers, z, text, hovertemplate: "%{text}<extra></extra>", hoverongaps: false };
    const ticks = [1, 0.997, 0.99, 0.9, 0.5, 0];
    const bar = narrow() ? { orientation: "h", thickness: 12, y: -0.22, yanchor: "top", xanchor: "center", x: 0.5 } : { thickness: 14 };
    if (quantity === "overlap") {
      Object.assign(trace, { colorscale: "Cividis", zmin: -vOf(map, 0), zmax: -map.v[0],
        colorbar: { ...bar, title: { text: map.kind.replace("_", " ") + " overlap", side: narrow() ? "top" : "right" },
          tickvals: ticks.map((t) => -vOf(map, t)), ticktext: ticks.map(String) } });
    } else {
      const logs = [-3, -2, -1, 0, 1, 2, 3];
      Object.assign(trace, { colorscale: "RdBu", zmin: -data.maps.log2_ratio, zmax: data.maps.log2_ratio,
        colorbar: { ...bar, title: { text: "norm b / norm a", side: narrow() ? "top" : "right" }, tickvals: logs, ticktext: logs.map((x) => String(2 ** x)) } });
    }
    const layout = themed({ height: narrow() ? 500 : 460, margin: { l: 50, r: 10, t: 30, b: narrow() ? 120 : 50 },
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      xaxis: { title: { text: "generated position" }, zeroline: false, showgrid: false },
      yaxis: { title: { text: "layer (0-based)" }, zeroline: false, showgrid: false } });
    const apart = map.differs_from && map.differs_from[index];
    if (typeof apart === "number") {
      layout.shapes = [{ type: "line", x0: apart - 0.5, x1: apart - 0.5, yref: "paper", y0: 0, y1: 1, line: { color: "#D55E00", dash: "dash", width: 2 } }];
      layout.annotations = [{ x: apart - 0.5, xanchor: "left", yref: "paper", y: 1, yanchor: "bottom", text: "texts differ from here", showarrow: false, font: { color: css("--ink") } }];
    }
    Plotly.react(byId("question-map"), [trace], layout, config);
    byId("question-words").textContent = pairs
      ? `${map.label}. Question ${data.maps.questions[index]}: ${shifted} of ${pairs} pairs below ${map.threshold.toPrecision(4)}; lowest overlap about ${shown(lowest)}, at ${at}.`
        + (typeof apart === "number" ? ` The two texts differ from position ${apart} on.` : "")
      : `${map.label}. Question ${data.maps.questions[index]} has no pair in this comparison.`;
  }

  if (data.maps.maps.length) {
    const fill = (select, labels) => labels.forEach((label) => {
      const option = document.createElement("option");
      option.textContent = label;
      select.append(option);
    });
    fill(pick.question, data.maps.questions);
    fill(pick.comparison, data.maps.maps.map((map) => map.comparison));
    document.querySelector(".controls").hidden = false;
    Object.values(pick).forEach((select) => select.addEventListener("change", drawMap));
    const step = (by) => {
      const n = pick.question.options.length;
      pick.question.selectedIndex = (pick.question.selectedIndex + by + n) % n;
      drawMap();
    };
    byId("previous").addEventListener("click", () => step(-1));
    byId("next").addEventListener("click", () => step(1));
  }
  drawAll();
  dark.addEventListener("change", drawAll);
  window.addEventListener("beforeprint", drawAll);
  window.addEventListener("afterprint", drawAll);
  let wasNarrow = narrow();
  window.addEventListener("resize", () => { if (narrow() !== wasNarrow) { wasNarrow = narrow(); drawAll(); } });
  document.documentElement.dataset.ready = "yes";
})();
