"use strict";
// Draws a map of positions across and layers up on a canvas, with its scale, and says which cell is where.
const explorerMap = (() => {
  const CIVIDIS = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];
  const DIVERGING = ["#0072b2", "#5aa7d6", "#b9d8ec", "#f2f0eb", "#f3c8a4", "#e8935a", "#d55e00"];
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const table = (stops) => Array.from({ length: 256 }, (_, i) => {
    const x = i / 255 * (stops.length - 1), k = Math.min(stops.length - 2, Math.floor(x)), a = rgb(stops[k]), b = rgb(stops[k + 1]);
    return a.map((v, j) => Math.round(v + (x - k) * (b[j] - v)));
  });
  const COLOURS = { overlap: table(CIVIDIS), relative_l2: table(CIVIDIS), norm: table(DIVERGING), difference: table(DIVERGING) };

  // 1 - overlap and relative L2 are coloured by their logarithm, bright is far, between the ends [low, high] that
  // hold for the whole comparison; a norm ratio from half to twice, two runs' 1 - overlap from a tenth to ten times.
  function scale(quantity, [low, high]) {
    if (quantity === "difference") return { of: (x) => (x + 1) / 2, ticks: [[0, "0.1"], [0.5, "1"], [1, "10"]], title: "1 - overlap, B / A" };
    if (quantity === "norm") return { of: (x) => (x + 1) / 2, ticks: [-1, 0, 1].map((x) => [(x + 1) / 2, String(2 ** x)]), title: "norm b / norm a" };
    const from = Math.log10(low), to = Math.log10(high), of = (x) => (Math.log10(Math.max(x, 1e-9)) - from) / (to - from);
    const ticks = [];
    for (const d of [1e-6, 1e-5, 1e-4, 0.001, 0.01, 0.1, 0.5, 1, 2]) {
      const at = of(d);
      if (at < -0.01 || at > 1.01 || (ticks.length && at - ticks.at(-1)[0] < 0.17)) continue;
      ticks.push([at, quantity === "overlap" ? String(Number((1 - d).toFixed(6))) : String(d)]);
    }
    return { of, ticks, title: quantity === "overlap" ? "overlap" : "relative L2" };
  }
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function pixels({ values, P, L, quantity, ends }) {
    const image = document.createElement("canvas");
    image.width = Math.max(1, P);
    image.height = L;
    const context = image.getContext("2d"), cells = context.createImageData(image.width, L), { of } = scale(quantity, ends), colours = COLOURS[quantity];
    for (let l = 0; l < L; l++) {
      for (let p = 0; p < P; p++) {
        const x = values[l * P + p];
        if (Number.isNaN(x)) continue;
        const c = colours[Math.max(0, Math.min(255, Math.round(255 * of(x))))];
        cells.data.set([...c, 255], 4 * ((L - 1 - l) * image.width + p));
      }
    }
    context.putImageData(cells, 0, 0);
    return image;
  }

  function sized(canvas, width, height) {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.clearRect(0, 0, width, height);
    context.imageSmoothingEnabled = false;
    return context;
  }

  // `view`: values, P, L, columns (positions shown), layers, quantity, ends (of its colours), threshold (of 1 - overlap,
  // or null), cursor, apart.
  function draw(canvas, view) {
    const width = canvas.clientWidth || 600, small = width < 480, height = small ? 330 : 400;
    const g = { x: 40, y: 46, w: width - 48, h: height - 46 - 40 }, cw = g.w / view.columns, ch = g.h / view.L;
    const c = sized(canvas, width, height), ink = css("--soft"), { of, ticks, title } = scale(view.quantity, view.ends);
    c.font = `12px ${css("--sans") || "system-ui, sans-serif"}`;
    c.fillStyle = css("--panel");
    c.fillRect(g.x, g.y, g.w, g.h);
    if (view.P) c.drawImage(pixels(view), g.x, g.y, cw * view.P, g.h);
    if (view.quantity === "overlap" && view.threshold !== null) contour(c, view, g, cw, ch);
    if (typeof view.apart === "number") {
      c.strokeStyle = "#d55e00"; c.lineWidth = 2; c.setLineDash([5, 4]);
      c.beginPath(); c.moveTo(g.x + cw * view.apart, g.y - 4); c.lineTo(g.x + cw * view.apart, g.y + g.h); c.stroke(); c.setLineDash([]);
    }
    c.fillStyle = ink;
    c.textAlign = "center"; c.textBaseline = "top";
    const stepX = view.columns > 40 ? (small ? 16 : 8) : view.columns > 12 ? 4 : 1;
    for (let p = 0; p < view.columns; p += stepX) c.fillText(p, g.x + cw * (p + 0.5), g.y + g.h + 5);
    c.fillText("generated position", g.x + g.w / 2, g.y + g.h + 22);
    c.textAlign = "right"; c.textBaseline = "middle";
    const stepY = view.L > 15 ? 5 : view.L > 8 ? 2 : 1;
    for (let l = 0; l < view.L; l += stepY) c.fillText(view.layers[l], g.x - 6, g.y + g.h - ch * (l + 0.5));
    c.save(); c.translate(10, g.y + g.h / 2); c.rotate(-Math.PI / 2); c.textAlign = "center"; c.fillText("layer", 0, 0); c.restore();
    bar(c, view, g, of, ticks, title, ink);
    if (view.cursor) {
      const [p, l] = view.cursor, x = g.x + cw * p, y = g.y + g.h - ch * (l + 1);
      c.lineWidth = 1; c.strokeStyle = "rgba(255,255,255,0.55)";
      c.beginPath(); c.moveTo(x + cw / 2, g.y); c.lineTo(x + cw / 2, y); c.moveTo(x + cw / 2, y + ch); c.lineTo(x + cw / 2, g.y + g.h); c.stroke();
      c.lineWidth = 4; c.strokeStyle = "#000"; c.strokeRect(x - 1, y - 1, cw + 2, ch + 2);
      c.lineWidth = 2; c.strokeStyle = "#fff"; c.strokeRect(x - 1, y - 1, cw + 2, ch + 2);
    }
    canvas.cells = g;
  }

  // Lines round the cells below the threshold, so that a shift does not rest on colour alone.
  function contour(c, view, g, cw, ch) {
    const inside = (l, p) => l >= 0 && l < view.L && p >= 0 && p < view.P && view.values[l * view.P + p] > view.threshold;
    c.strokeStyle = "#ffffff"; c.lineWidth = 1.2;
    c.beginPath();
    for (let l = 0; l < view.L; l++) {
      for (let p = 0; p < view.P; p++) {
        if (!inside(l, p)) continue;
        const x = g.x + cw * p, y = g.y + g.h - ch * (l + 1);
        if (!inside(l + 1, p)) { c.moveTo(x, y); c.lineTo(x + cw, y); }
        if (!inside(l - 1, p)) { c.moveTo(x, y + ch); c.lineTo(x + cw, y + ch); }
        if (!inside(l, p - 1)) { c.moveTo(x, y); c.lineTo(x, y + ch); }
        if (!inside(l, p + 1)) { c.moveTo(x + cw, y); c.lineTo(x + cw, y + ch); }
      }
    }
    c.stroke();
  }

  function bar(c, view, g, of, ticks, title, ink) {
    const w = Math.floor(Math.min(260, g.w * 0.62)), x = g.x + g.w - w, y = 6, h = 10, colours = COLOURS[view.quantity];
    for (let i = 0; i < w; i++) {
      c.fillStyle = `rgb(${colours[Math.round(255 * i / (w - 1))].join(",")})`;
      c.fillRect(x + i, y, 1.5, h);
    }
    c.fillStyle = ink; c.textBaseline = "top"; c.textAlign = "center";
    for (const [t, label] of ticks) c.fillText(label, x + w * Math.max(0.02, Math.min(0.97, t)), y + h + 4);
    c.textAlign = "right"; c.textBaseline = "middle";
    c.fillText(title, x - 10, y + h / 2);
    if (view.quantity === "overlap" && view.threshold !== null) {
      const t = x + w * Math.max(0, Math.min(1, of(view.threshold)));
      c.strokeStyle = css("--ink"); c.lineWidth = 2; c.beginPath(); c.moveTo(t, y - 4); c.lineTo(t, y + h + 3); c.stroke();
    }
  }

  function thumbnail(canvas, view) {
    const width = canvas.clientWidth || 160, c = sized(canvas, width, 84);
    c.fillStyle = css("--panel");
    c.fillRect(0, 0, width, 84);
    if (view.P) c.drawImage(pixels(view), 0, 0, width * view.P / view.columns, 84);
  }

  function hit(canvas, event, columns, L) {
    const box = canvas.getBoundingClientRect(), g = canvas.cells;
    const p = Math.floor((event.clientX - box.left - g.x) / g.w * columns), l = Math.floor((g.y + g.h - (event.clientY - box.top)) / g.h * L);
    return p >= 0 && p < columns && l >= 0 && l < L ? [p, l] : null;
  }

  return { draw, thumbnail, hit };
})();
