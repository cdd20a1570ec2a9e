// Notes of the reader at a question or a claim, kept in the browser; exported and imported as JSON.
function notes(data, explorer) {
  const byId = (id) => document.getElementById(id), key = `sst-interp notes ${data.of}`;
  const PLACE = /^(q=\d{1,9}|claim=[\w.-]{1,40})$/, LONGEST = 20000;
  const clean = (all) => Object.fromEntries(Object.entries(all && typeof all === "object" ? all : {}).filter(([place, text]) => PLACE.test(place) && typeof text === "string" && text && text.length <= LONGEST));
  const say = (words) => { byId("notes-said").textContent = words; };
  let own = {};
  try { own = clean(JSON.parse(localStorage.getItem(key) || "{}")); } catch { say("This browser keeps nothing: export what you write."); }

  const boxes = [...document.querySelectorAll(".note-here")].map((box, i) => {
    const area = el("textarea", { id: `note-${i}`, rows: 2, maxlength: LONGEST }), given = el("p", { class: "given" });
    const label = el("label", { for: `note-${i}` });
    const place = () => box.dataset.note === "question" ? explorer && `q=${explorer.where().q}` : box.dataset.note;
    area.addEventListener("input", () => { put(place(), area.value); list(); });
    box.append(given, label, area);
    return { show() {
      const at = place();
      box.hidden = !at;
      if (!at) return;
      label.textContent = `Your note on ${words(at)}`;
      if (document.activeElement !== area || area.dataset.at !== at) area.value = own[at] || "";
      area.dataset.at = at;
      given.textContent = data.notes[at] ? `Note: ${data.notes[at]}` : "";
    } };
  });
  const words = (place) => place.replace("q=", "question ").replace("claim=", "claim ");
  function put(place, text) {
    if (text) own[place] = text; else delete own[place];
    try { localStorage.setItem(key, JSON.stringify(own)); } catch { say("This browser keeps nothing: export what you write."); }
  }
  function list() {
    byId("own-notes").replaceChildren(...Object.entries(own).map(([place, text]) => el("li", {}, el("a", { href: `#${place}` }, words(place)), ": ", el("span", { class: "said" }, text))));
  }
  const show = () => { boxes.forEach((box) => box.show()); list(); };

  byId("notes-out").addEventListener("click", () => {
    const text = JSON.stringify({ of: data.of, run: data.name, notes: { ...data.notes, ...own } }, null, 2), link = el("a", { download: "notes.json" });
    link.href = URL.createObjectURL(new Blob([`${text}\n`], { type: "application/json" }));
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  });
  byId("notes-in").addEventListener("change", async (event) => {
    const [file] = event.target.files;
    if (!file) return;
    try {
      const contents = JSON.parse(await file.text()), got = clean(contents.notes);
      if (contents.of !== data.of) throw new Error("they are about another capture");
      for (const [place, text] of Object.entries(got)) put(place, own[place] && own[place] !== text ? `${own[place]}\n${text}`.slice(0, LONGEST) : text);
      say(`${Object.keys(got).length} notes imported`);
    } catch (error) { say(`Not imported: ${error.message}`); }
    event.target.value = "";
    show();
  });
  byId("note-actions").hidden = false;
  document.addEventListener("moved", show);
  show();
}
