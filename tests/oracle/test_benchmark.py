"""launch.benchmark at tiny sizes: every kind of row agrees with its peer and is timed."""

import json


def test_rows_agree_and_are_timed(run_program, tmp_path):
  only = "--only=machine matmul,mixed padded,train,vae decode,text"
  done = run_program("benchmark", "--size=tiny", "--pairs=2", only, f"--out={tmp_path}/out.json")
  assert done.returncode == 0, done.stderr
  rows = json.loads((tmp_path / "out.json").read_text())["rows"]
  assert len(rows) == 7 and all(row["difference"] < 1e-4 and len(row["seconds"]) == 2 for row in rows)
  assert all(row["memory_mb"]["theirs"]["all"] > 0 for row in rows) and "mixed padded" in done.stdout
