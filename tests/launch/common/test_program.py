"""What all programs share: where compiled programs are kept."""

import jax

from launch.common import program


def test_compiled_programs_are_kept(monkeypatch, tmp_path):
  """In SORA_JAX_CACHE, unless the user says where; an empty place is none."""
  set_to = {}
  monkeypatch.setattr(jax.config, "update", lambda name, value: set_to.update({name: value}))
  monkeypatch.setenv("SORA_JAX_CACHE", str(tmp_path))
  for chosen in ("", str(tmp_path / "elsewhere")):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", chosen)
    program.keep_compiled()
    assert not set_to
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
  program.keep_compiled()
  (name, folder), *others = set_to.items()
  assert not others and name == "jax_compilation_cache_dir" and folder.startswith(f"{tmp_path}/compiled/")
  assert getattr(jax.config, name) != folder  # this process keeps what it had
