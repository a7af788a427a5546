// What Gradio's picture does not do by itself: a picture dropped onto another one, or pasted anywhere, takes its place.
function give(files) {
  const box = document.querySelector("#picture");
  if (!box || !box.offsetParent || !files.length) return false;
  if (box.querySelector("img")) box.querySelector("button").click(); // the cross
  const again = setInterval(() => {
    const input = box.querySelector("input[type=file]");
    if (!input) return;
    clearInterval(again);
    const carried = new DataTransfer();
    carried.items.add(files[0]);
    input.files = carried.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  }, 50);
  return true;
}
document.addEventListener("drop", (event) => {
  if (!event.target.closest("#picture")) return;
  if (give([...event.dataTransfer.files])) {
    event.preventDefault();
    event.stopImmediatePropagation();
  }
}, true);
document.addEventListener("paste", (event) => {
  if (give([...event.clipboardData.files])) event.preventDefault();
});
