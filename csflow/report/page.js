"use strict";
// The page is whole without this script: it adds filters, order, pages, a larger view and the theme switch.
const root = document.documentElement;
const byId = (id) => document.getElementById(id);
root.classList.remove("no-script");

// Theme. Some browsers give pages from files no storage.
function remembered(value) {
  try {
    if (value) localStorage.setItem("csflow-theme", value);
    return localStorage.getItem("csflow-theme");
  } catch {
    return null;
  }
}
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const theme = () => root.dataset.theme ?? (prefersDark.matches ? "dark" : "light");
function nameSwitch() {
  byId("theme").textContent = theme() === "dark" ? "Light theme" : "Dark theme";
}
if (remembered()) root.dataset.theme = remembered();
prefersDark.addEventListener("change", nameSwitch);
byId("theme").addEventListener("click", () => {
  root.dataset.theme = theme() === "dark" ? "light" : "dark";
  remembered(root.dataset.theme);
  nameSwitch();
});
nameSwitch();

// Gallery.
const PAGE = 12;
const gallery = byId("gallery");
if (gallery) startGallery([...gallery.children]);

function startGallery(cards) {
  const order = {
    score: (a, b) => a.dataset.rank - b.dataset.rank,
    newest: (a, b) => b.dataset.scored.localeCompare(a.dataset.scored) || a.dataset.rank - b.dataset.rank,
    address: (a, b) => a.dataset.uri.localeCompare(b.dataset.uri),
  };
  const status = {
    all: () => true,
    listed: (card) => "listed" in card.dataset,
    flagged: (card) => "flagged" in card.dataset,
    unflagged: (card) => !("flagged" in card.dataset),
  };
  const dialog = byId("viewer");
  let found = cards;
  let page = 0;

  function refresh() {
    const text = byId("find").value.trim().toLowerCase();
    const is = status[byId("show").value];
    cards.sort(order[byId("order").value]);
    found = cards.filter((card) => is(card) && card.dataset.uri.toLowerCase().includes(text));
    const matching = new Set(found);
    for (const card of cards) card.classList.toggle("filtered", !matching.has(card));
    gallery.replaceChildren(...cards);
    turnTo(0);
  }

  function turnTo(wanted) {
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.min(Math.max(wanted, 0), pages - 1);
    const first = page * PAGE;
    const last = Math.min(first + PAGE, found.length);
    found.forEach((card, i) => card.classList.toggle("elsewhere", i < first || i >= last));
    byId("previous").disabled = page === 0;
    byId("next").disabled = page === pages - 1;
    byId("page").textContent = `Page ${page + 1} of ${pages}`;
    byId("status").textContent = found.length
      ? `${found.length} of ${cards.length} images match; ${first + 1} to ${last} are shown`
      : "No image matches. Clear the search or show all images.";
  }

  function view(card) {
    const position = found.indexOf(card);
    const copy = card.cloneNode(true);
    copy.querySelector("button.pictures")?.replaceWith(unwrapped(copy.querySelector("button.pictures")));
    dialog.querySelector(".detail").replaceChildren(...copy.childNodes);
    byId("viewer-title").textContent = `Image ${position + 1} of ${found.length}`;
    byId("viewer-previous").disabled = position <= 0;
    byId("viewer-next").disabled = position >= found.length - 1;
    dialog.dataset.position = position;
    if (!dialog.open) dialog.showModal();
  }

  // Enlarged, the pictures are no button any more.
  function unwrapped(button) {
    const box = document.createElement("div");
    box.className = button.className;
    box.style.cssText = button.style.cssText;
    box.append(...button.childNodes);
    return box;
  }

  function step(by) {
    if (!dialog.open) return turnTo(page + by);
    const card = found[Number(dialog.dataset.position) + by];
    if (card) view(card);
  }

  byId("find").form.addEventListener("submit", (event) => event.preventDefault());
  for (const id of ["find", "show", "order"]) byId(id).addEventListener("input", refresh);
  byId("previous").addEventListener("click", () => step(-1));
  byId("next").addEventListener("click", () => step(1));
  byId("viewer-previous").addEventListener("click", () => step(-1));
  byId("viewer-next").addEventListener("click", () => step(1));
  byId("viewer-close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => {
    const position = Number(dialog.dataset.position);
    turnTo(Math.floor(position / PAGE));
    found[position]?.querySelector("button")?.focus();
  });
  gallery.addEventListener("click", (event) => {
    const pictures = event.target.closest(".pictures");
    if (pictures) view(pictures.closest("li"));
  });
  addEventListener("keydown", (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey || event.target.matches("input, select, textarea")) return;
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    step(by);
  });
  refresh();
}
