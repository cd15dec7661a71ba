// Filters the documents. Without this script the whole table is shown, and the form is hidden.
(() => {
  "use strict";
  const form = document.getElementById("filters");
  if (!form) return;
  const AT_ONCE = 50;
  const rows = Array.from(document.querySelectorAll("#flips tbody tr"));
  const texts = rows.map((row) => row.textContent.toLowerCase());
  const count = document.getElementById("count");
  const more = document.getElementById("more");
  let limit = AT_ONCE;

  const show = () => {
    const wanted = form.elements.text.value.trim().toLowerCase();
    const kept = ["task", "direction", "seen"].filter((name) => form.elements[name].value !== "");
    let matching = 0;
    rows.forEach((row, index) => {
      const fits = kept.every((name) => row.dataset[name] === form.elements[name].value) && texts[index].includes(wanted);
      if (fits) matching += 1;
      row.hidden = !fits || matching > limit;
    });
    const shown = Math.min(matching, limit);
    count.textContent = matching === 0
      ? "No matching documents."
      : `${shown} of ${matching} matching documents shown; the page has ${rows.length}.`;
    more.hidden = matching <= limit;
  };
  const again = () => {
    limit = AT_ONCE;
    show();
  };

  form.addEventListener("input", again);
  form.addEventListener("reset", () => setTimeout(again));
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => {
    limit += AT_ONCE;
    show();
  });
  form.hidden = false;
  show();
})();
