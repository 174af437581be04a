"""A headless Chromium, driven through its DevTools protocol over a pipe
(chromedevtools.github.io/devtools-protocol): JSON messages, each ended by a zero byte.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time


class Chromium:
  """Use with `with`. run(script) -> its value; wait(script) until it is true."""

  def __init__(self, folder, width=1280, height=900):
    # its file descriptors: 3 to read, 4 to write
    theirs_in, self._out = os.pipe()
    self._in, theirs_out = os.pipe()
    command = [
      "bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "sh", shutil.which("chromium"), "--headless",
      "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
      "--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder}",
      f"--window-size={width},{height}", "about:blank",
    ]  # fmt: skip
    self._process = subprocess.Popen(
      command,
      pass_fds=(theirs_in, theirs_out),
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    self._number, self._read, self._session = 0, b"", None
    self.events = []  # of the page: warnings and errors among them

  def __enter__(self):
    try:
      pages = self.call("Target.getTargets")["targetInfos"]
      target = next(page["targetId"] for page in pages if page["type"] == "page")
      attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
      self._session = attached["sessionId"]
      for domain in ("Page", "Runtime", "Log"):
        self.call(f"{domain}.enable")
    except BaseException:
      self.__exit__()
      raise
    return self

  def __exit__(self, *_):
    self._process.terminate()
    try:
      self._process.wait(10)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    os.close(self._in)
    os.close(self._out)

  def call(self, method, timeout=60, **params):
    """A command of the protocol -> its result."""
    self._number += 1
    message = {"id": self._number, "method": method, "params": params}
    message |= {"sessionId": self._session} if self._session else {}
    os.write(self._out, json.dumps(message).encode() + b"\0")
    end = time.monotonic() + timeout
    while True:
      answer = self._receive(end - time.monotonic(), method)
      if answer.get("id") == self._number:
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]
      self.events.append(answer)

  def _receive(self, timeout, what):
    end = time.monotonic() + timeout
    while b"\0" not in self._read:
      ready, _, _ = select.select([self._in], [], [], max(0, end - time.monotonic()))
      piece = os.read(self._in, 1 << 16) if ready else b""
      assert piece, f"{what}: Chromium does not answer"
      self._read += piece
    message, _, self._read = self._read.partition(b"\0")
    return json.loads(message)

  def open(self, url):
    self.call("Page.navigate", url=url)

  def run(self, script):
    """The value of an expression in the page."""
    answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
    assert "exceptionDetails" not in answer, answer["exceptionDetails"]
    return answer["result"].get("value")

  def wait(self, script, timeout=60):
    """Asks until the expression is true in the page."""
    end = time.monotonic() + timeout
    while not self.run(f"!!({script})"):
      assert time.monotonic() < end, (
        f"{script} did not become true; the page: {self.run('document.body.innerText')}"
      )
      time.sleep(0.05)

  def type(self, selector, text):
    """Types into an input, as a keyboard does."""
    self.run(f"document.querySelector({json.dumps(selector)}).focus()")
    self.call("Input.insertText", text=text)

  def choose_file(self, selector, path):
    """Gives a file to an input of files."""
    root = self.call("DOM.getDocument")["root"]["nodeId"]
    node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
    self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

  def size(self, width, height, mobile=False):
    self.call(
      "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile
    )

  def screenshot(self, path):
    data = self.call("Page.captureScreenshot", format="png")["data"]
    path.write_bytes(base64.b64decode(data))

  def complaints(self):
    """What the page's console says is wrong."""
    found = []
    for event in self.events:
      params = event.get("params", {})
      if event.get("method") == "Log.entryAdded" and params["entry"]["level"] in ("warning", "error"):
        found.append(params["entry"]["text"])
      if event.get("method") == "Runtime.exceptionThrown":
        found.append(str(params["exceptionDetails"]))
    return found
