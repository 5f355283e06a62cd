
// Gallery: filters, order, pages, and one image enlarged.
const PAGE = 12;
const ORDERS = {
  score: (a, b) => a.dataset.rank - b.dataset.rank,
  newest: (a, b) => b.dataset.scored.localeCompare(a.dataset.scored) || a.dataset.rank - b.dataset.rank,
  address: (a, b) => a.dataset.uri.localeCompare(b.dataset.uri),
};
const CHOICES = {
  all: () => true,
  listed: (card) => "listed" in card.dataset,
  flagged: (card) => "flagged" in card.dataset,
  unflagged: (card) => !("flagged" in card.dataset),
  open: (card) => verdictOf(card) === undefined,
  defect: (card) => verdictOf(card) === DEFECT,
  normal: (card) => verdictOf(card) === NORMAL,
};
const nameOf = (card) => card.dataset.uri.slice(card.dataset.uri.lastIndexOf("/") + 1);

class Gallery {
  constructor(list) {
    this.list = list;
    this.cards = [...list.children];
    this.found = this.cards;
    this.page = 0;
    this.chosen = new Map(); // by kind: what was clicked in a chart, {label, test}
    this.dialog = byId("viewer");
    this.listen();
    this.refresh();
  }

  refresh() {
    const text = byId("find").value.trim().toLowerCase();
    const choice = CHOICES[byId("show").value];
    const tests = [...this.chosen.values()].map((filter) => filter.test);
    const matches = (card) =>
      choice(card) && card.dataset.uri.toLowerCase().includes(text) && tests.every((test) => test(card));
    this.cards.sort(ORDERS[byId("order").value]);
    this.found = this.cards.filter(matches);
    const matching = new Set(this.found);
    for (const card of this.cards) card.classList.toggle("filtered", !matching.has(card));
    this.list.replaceChildren(...this.cards);
    this.turnTo(0);
  }

  turnTo(wanted) {
    const pages = Math.max(1, Math.ceil(this.found.length / PAGE));
    this.page = Math.min(Math.max(wanted, 0), pages - 1);
    const first = this.page * PAGE;
    const shown = this.found.slice(first, first + PAGE);
    const onPage = new Set(shown);
    for (const card of this.found) card.classList.toggle("elsewhere", !onPage.has(card));
    for (const card of shown) complete(card);
    byId("previous").disabled = this.page === 0;
    byId("next").disabled = this.page === pages - 1;
    byId("page").value = this.page + 1;
    byId("page").max = pages;
    byId("pages").textContent = `of ${pages}`;
    byId("status").textContent = this.found.length
      ? `${this.found.length} of ${this.cards.length} images match; ${first + 1} to ${first + shown.length} are shown`
      : "No image matches. Clear the search, take filters away, or show all images.";
    byId("beyond").textContent = this.beyond();
  }

  // What a choice has more of than this page.
  beyond() {
    const { value, selectedOptions } = byId("show");
    const more = Number(selectedOptions[0].dataset.beyond ?? 0);
    if (!more) return "";
    const what = { listed: "on the defect list", flagged: "flagged" }[value];
    return `${more.toLocaleString("en")} more ${more === 1 ? "image is" : "images are"} ${what}, with lower scores. A report with a larger --top shows more.`;
  }

  // Shows only what passes a test, until another one of its kind is chosen or it is taken away.
  choose(kind, label, test) {
    if (this.chosen.get(kind)?.label === label) return this.unchoose(kind);
    this.chosen.set(kind, { label, test });
    this.listChosen();
    byId("images").scrollIntoView();
    byId("chosen").querySelector(`[data-kind="${kind}"]`).focus({ preventScroll: true });
  }

  unchoose(kind) {
    this.chosen.delete(kind);
    this.listChosen();
  }

  listChosen() {
    const items = [...this.chosen].map(([kind, { label }]) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: `${label} ✕` });
      button.dataset.kind = kind;
      button.ariaLabel = `Take the filter away: ${label}`;
      button.addEventListener("click", () => {
        this.unchoose(kind);
        byId("find").focus();
      });
      const item = document.createElement("li");
      item.append(button);
      return item;
    });
    byId("chosen").replaceChildren(...items);
    this.refresh();
  }

  view(card) {
    const position = this.found.indexOf(card);
    complete(card);
    const copy = card.cloneNode(true);
    copy.querySelector("button.pictures")?.replaceWith(unwrapped(copy.querySelector("button.pictures")));
    this.dialog.querySelector(".detail").replaceChildren(...copy.childNodes);
    byId("viewer-title").textContent = `Image ${position + 1} of ${this.found.length}`;
    byId("viewer-previous").disabled = position <= 0;
    byId("viewer-next").disabled = position >= this.found.length - 1;
    this.dialog.dataset.position = position;
    if (!this.dialog.open) this.dialog.showModal();
  }

  // The enlarged image, or the one whose card has the focus.
  get current() {
    if (this.dialog.open) return this.found[Number(this.dialog.dataset.position)];
    return document.activeElement.closest("#gallery > li");
  }

  step(by) {
    if (!this.dialog.open) return this.turnTo(this.page + by);
    const card = this.found[Number(this.dialog.dataset.position) + by];
    if (card) this.view(card);
  }

  // At once, not on the dialog's event "close": it comes later, and a key in between would judge another card.
  leave() {
    this.dialog.close();
    const position = Number(this.dialog.dataset.position);
    this.turnTo(Math.floor(position / PAGE));
    this.found[position]?.querySelector("button")?.focus();
  }

  listen() {
    byId("find").form.addEventListener("submit", (event) => event.preventDefault());
    for (const id of ["find", "show", "order"]) byId(id).addEventListener("input", () => this.refresh());
    byId("page").addEventListener("change", (event) => this.turnTo(Math.round(event.target.value || 1) - 1));
    byId("previous").addEventListener("click", () => this.step(-1));
    byId("next").addEventListener("click", () => this.step(1));
    byId("viewer-previous").addEventListener("click", () => this.step(-1));
    byId("viewer-next").addEventListener("click", () => this.step(1));
    byId("viewer-close").addEventListener("click", () => this.leave());
    this.dialog.addEventListener("cancel", () => this.leave()); // Escape
    this.list.addEventListener("click", (event) => {
      const pictures = event.target.closest(".pictures");
      if (pictures) this.view(pictures.closest("li"));
    });
    for (const link of document.querySelectorAll("a[data-show]")) {
      link.addEventListener("click", () => {
        byId("show").value = link.dataset.show;
        this.refresh();
      });
    }
    for (const id of ["opacity", "viewer-opacity"]) byId(id)?.addEventListener("input", setOpacity);
    addEventListener("beforeprint", () => this.found.forEach(complete));
  }
}

// For screen readers: what others see on a button.
const say = (text) => (byId("spoken").textContent = text);

function setOpacity(event) {
  root.style.setProperty("--opacity", event.target.value / 100);
  for (const id of ["opacity", "viewer-opacity"]) byId(id).value = event.target.value;
}

// Adds what only a card that is shown needs: the photograph once more, under the map beside it, and the actions.
function complete(card) {
  if (card.querySelector(".actions")) return;
  const photograph = card.querySelector("img")?.cloneNode();
  if (photograph) {
    photograph.ariaHidden = "true";
    card.querySelector(".over")?.prepend(photograph);
  }
  card.append(byId("actions").content.cloneNode(true));
  showVerdict(card, card);
}

// Enlarged, the pictures are no button any more.
function unwrapped(button) {
  const box = document.createElement("div");
  box.className = button.className;
  box.style.cssText = button.style.cssText;
  box.append(...button.childNodes);
  return box;
}

async function copyAddress(card, button) {
  try {
    await navigator.clipboard.writeText(card.dataset.uri);
  } catch {
    // Only some browsers let pages from files use the clipboard.
    const area = document.createElement("textarea");
    area.value = card.dataset.uri;
    button.after(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = "Copied";
  say(`The address of ${nameOf(card)} is copied`);
  setTimeout(() => (button.textContent = "Copy address"), 2000);
}
