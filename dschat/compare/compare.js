"use strict";
// Filters, sorts, hides who wrote what, and counts votes; the page reads without it.
const byId = (id) => document.getElementById(id);
const rows = [...document.querySelectorAll("article")];
const key = "dschat compare " + document.title + " " + rows.length + " " + location.pathname;
const votes = readVotes();

function readVotes() {
  try {
    const saved = JSON.parse(localStorage.getItem(key) || "{}");
    return saved && typeof saved === "object" ? saved : {};
  } catch {
    return {}; // storage is off: votes last as long as the page
  }
}

function keepVotes() {
  try {
    localStorage.setItem(key, JSON.stringify(votes));
  } catch {
    /* as above */
  }
}

const answersOf = (row) => [...row.querySelectorAll(".answer")];
const answerOf = (row, letter) => answersOf(row).find((a) => a.dataset.letter === letter);
const rewardOf = (row, letter) => Number(answerOf(row, letter).dataset.reward);
const wordsOf = (row) => Math.max(...answersOf(row).map((a) => Number(a.dataset.words)));
const textOf = (answer) => answer.querySelector(".words").textContent.trim();

function best(row) {
  const [first, second] = answersOf(row)
    .map((a) => [Number(a.dataset.reward), a.dataset.letter])
    .sort((x, y) => y[0] - x[0]);
  return first[0] > second[0] ? first[1] : null;
}

const tests = {
  all: () => true,
  voted: (row) => row.dataset.number in votes,
  unvoted: (row) => !(row.dataset.number in votes),
  vote: (row, letter) => votes[row.dataset.number] === letter,
  best: (row, letter) => best(row) === letter,
  cut: (row) => answersOf(row).some((a) => a.dataset.cut),
  differ: (row) => new Set(answersOf(row).map(textOf)).size > 1,
};
const orders = {
  number: (row) => Number(row.dataset.number),
  spread: (row) => -Number(row.dataset.spread),
  reward: (row, letter) => -rewardOf(row, letter),
  lowest: (row, letter) => rewardOf(row, letter),
  words: (row) => -wordsOf(row),
};

function arrange() {
  const wanted = byId("find").value.trim().toLowerCase();
  const [test, of] = byId("show").value.split(" ");
  const [order, by] = byId("sort").value.split(" ");
  const number = orders.number;
  const sorted = [...rows].sort(
    (x, y) => orders[order](x, by) - orders[order](y, by) || number(x) - number(y),
  );
  let shown = 0;
  for (const row of sorted) {
    const texts = [...row.querySelectorAll(".words")].map((e) => e.textContent).join("\n");
    row.hidden = !(tests[test](row, of) && texts.toLowerCase().includes(wanted));
    shown += !row.hidden;
    byId("rows").append(row);
  }
  byId("none").hidden = shown > 0;
  byId("rows").append(byId("none"));
  tell(shown);
}

function tell(shown) {
  const given = Object.values(votes);
  const count = (choice) => given.filter((vote) => vote === choice).length;
  const letters = answersOf(rows[0]).map((a) => a.dataset.letter).sort();
  const each = [...letters, "tie"].map((choice) => `${choice} ${count(choice)}`).join(", ");
  byId("tally").textContent =
    `${shown} of ${rows.length} prompts · votes: ` + (given.length ? each : "none");
}

function shuffle(row) {
  const answers = answersOf(row);
  for (let i = answers.length - 1; i > 0; i--) {
    const j = Math.floor(Math.random() * (i + 1));
    [answers[i], answers[j]] = [answers[j], answers[i]];
  }
  row.querySelector(".answers").append(...answers);
}

function inOrder(row) {
  const answers = answersOf(row).sort((x, y) => (x.dataset.letter < y.dataset.letter ? -1 : 1));
  row.querySelector(".answers").append(...answers);
}

function drawVotes(row) {
  const blind = byId("blind").checked;
  const vote = votes[row.dataset.number];
  const open = !blind || vote !== undefined;
  for (const answer of answersOf(row)) answer.classList.toggle("shown", open);
  const places = ["first", "second", "third"];
  const word = answersOf(row).length > 2 ? "best" : "better";
  const choices = answersOf(row).map((answer, place) => {
    const letter = answer.dataset.letter;
    return [letter, `${open ? letter : "the " + places[place]} is ${word}`];
  });
  const buttons = [...choices, ["tie", "a tie"]].map(([choice, text]) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.dataset.choice = choice;
    button.setAttribute("aria-pressed", String(vote === choice));
    if (open && choice !== "tie") button.classList.add(choice);
    button.addEventListener("click", () => cast(row, choice));
    return button;
  });
  row.querySelector(".votes").replaceChildren(...buttons);
}

function cast(row, choice) {
  const number = row.dataset.number;
  if (votes[number] === choice) delete votes[number];
  else votes[number] = choice;
  keepVotes();
  drawVotes(row);
  row.querySelector(`button[data-choice="${choice}"]`).focus();
  tell(rows.filter((r) => !r.hidden).length);
}

function blindly() {
  const blind = byId("blind").checked;
  document.body.classList.toggle("blind", blind);
  for (const row of rows) {
    if (blind) shuffle(row);
    else inOrder(row);
    drawVotes(row);
  }
}

function save() {
  const list = rows
    .filter((row) => row.dataset.number in votes)
    .map((row) => ({ prompt: Number(row.dataset.number), vote: votes[row.dataset.number] }));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(list, null, 1)]));
  link.download = "votes.json";
  link.click();
  URL.revokeObjectURL(link.href);
}

function forget() {
  for (const number of Object.keys(votes)) delete votes[number];
  keepVotes();
  rows.forEach(drawVotes);
  arrange();
}

for (const id of ["find", "show", "sort"]) byId(id).addEventListener("input", arrange);
byId("blind").addEventListener("input", blindly);
byId("save").addEventListener("click", save);
byId("forget").addEventListener("click", forget);
for (const row of rows) {
  row.querySelector(".votes").hidden = false;
  drawVotes(row);
}
byId("tools").hidden = false;
arrange();
