document.querySelectorAll("table.sortable thead th").forEach((th, i, all) => {
  const table = th.closest("table"), at = th.cellIndex, button = document.createElement("button");
  button.textContent = th.textContent;
  th.replaceChildren(button);
  button.addEventListener("click", () => {
    const down = th.getAttribute("aria-sort") === "ascending", body = table.tBodies[0];
    const value = row => row.cells[at].dataset.sort;
    const order = (a, b) => a === b ? 0 : a === "" ? 1 : b === "" ? -1 : (down ? -1 : 1) * (isNaN(a) || isNaN(b) ? (a < b ? -1 : 1) : a - b);
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    th.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...[...body.rows].sort((a, b) => order(value(a), value(b))));
  });
});
