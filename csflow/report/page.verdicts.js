
// Verdicts: of an image version, whatever the report; kept in this browser until they are downloaded.
const [NORMAL, DEFECT] = [0, 1];
const VERDICTS = { [DEFECT]: "defect", [NORMAL]: "false alarm" };
const VERDICT_KEYS = { d: DEFECT, f: NORMAL, u: undefined };
const STORED = "csflow-verdicts";
let verdicts = storedVerdicts() ?? new Map();

function storedVerdicts() {
  try {
    return new Map(JSON.parse(remembered(STORED) ?? undefined));
  } catch {
    return undefined;
  }
}

const versionOf = (card) => `${card.dataset.version} ${card.dataset.uri}`;
const verdictOf = (card) => verdicts.get(versionOf(card));

function give(card, verdict) {
  verdicts = storedVerdicts() ?? verdicts; // other tabs give some, too
  if (verdict === undefined) verdicts.delete(versionOf(card));
  else verdicts.set(versionOf(card), verdict);
  remembered(STORED, JSON.stringify([...verdicts]));
}

function showVerdict(card, shownIn) {
  for (const button of shownIn.querySelectorAll("[data-give]")) {
    button.ariaPressed = String(Number(button.dataset.give) === verdictOf(card));
  }
}

function countVerdicts(cards) {
  const given = cards.map(verdictOf);
  const [defects, normal] = [DEFECT, NORMAL].map((verdict) => given.filter((one) => one === verdict).length);
  const judged = defects + normal;
  byId("verdicts").textContent = judged
    ? `${judged} of ${cards.length} images have a verdict: ${count(defects, "defect")}, ${count(normal, "false alarm")}`
    : "No verdicts yet. D on an image says defect, F false alarm.";
  byId("labels").disabled = judged === 0;
}

const count = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;

// The table that `csflow evaluate --labels` takes.
function labelTable(cards) {
  const quoted = (text) => `"${text.replaceAll('"', '""')}"`;
  const rows = cards
    .filter((card) => verdictOf(card) !== undefined)
    .map((card) => `${quoted(card.dataset.uri)},${verdictOf(card)},${quoted(card.dataset.version)}`);
  return `image_uri,label,image_version\n${rows.join("\n")}\n`;
}

function download(name, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function startVerdicts(gallery) {
  const judge = (card, verdict) => {
    give(card, verdict);
    showVerdict(card, card);
    if (gallery.dialog.open) showVerdict(card, gallery.dialog.querySelector(".detail"));
    countVerdicts(gallery.cards);
    say(`${nameOf(card)}: ${VERDICTS[verdict] ?? "no verdict"}`);
  };
  const act = (event) => {
    const button = event.target.closest("[data-give], [data-copy]");
    if (!button) return;
    const card = button.closest("#gallery > li") ?? gallery.current;
    if ("copy" in button.dataset) return copyAddress(card, button);
    const verdict = Number(button.dataset.give);
    judge(card, verdictOf(card) === verdict ? undefined : verdict);
  };
  gallery.list.addEventListener("click", act);
  gallery.dialog.addEventListener("click", act);
  addEventListener("keydown", (event) => {
    const key = event.key.toLowerCase();
    const card = gallery.current;
    if (isForSomethingElse(event, "input:not([type=range]), select, textarea")) return;
    if (!(key in VERDICT_KEYS) || !card) return;
    judge(card, VERDICT_KEYS[key]);
    if (gallery.dialog.open && key !== "u") gallery.step(1);
  });
  byId("labels").addEventListener("click", (event) => {
    download(`labels-${event.target.dataset.model}.csv`, labelTable(gallery.cards));
  });
  countVerdicts(gallery.cards);
}
