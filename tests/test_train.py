"""A training step: packed equals alone and sharded equals unsharded, in loss and gradient; a bad update
changes nothing; a resumed run is the same."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sora_jax import batch as batches, checkpoint, layout as layouts, optim, patches, train
from sora_jax.diffusion import flow
from sora_jax.models import dit, t2v, text

TINY = dit.DiTConfig(depth=2, heads=2, head_size=16, mlp=64, channels=4, text_width=16, time_freqs=32)
TEXT = text.TextConfig(vocab=32, width=16, depth=1, heads=2, head_size=8, mlp=32)
SHAPE = batches.RowShape(length=48, clips=4, text=24)
SIGMA = flow.SigmaConfig()
KEY = jax.random.key(5)


def model(layout=None):
  return t2v.Model(TINY, TEXT, layout)


def clip(uid, thw):
  rng = np.random.default_rng(uid)
  tokens = patches.patchify(rng.normal(size=(*thw, 4)).astype(np.float32), (1, 1, 1))
  return batches.Clip(
    tokens,
    patches.coords(thw),
    [rng.integers(2, 32, rng.integers(2, 6)).astype(np.int32)],
    uid=uid,
    size=thw,
    fps=8.0,
  )


def rows():
  """Eight rows of clips, one of them half empty."""
  return [
    [clip(10 * r + 1, (2, 2, 3)), clip(10 * r + 2, (3, 2, 2))] + ([clip(10 * r + 3, (1, 2, 4))] if r else [])
    for r in range(8)
  ]


def weights(of):
  """Random weights of a model, the last layer included, which starts at zero and would hide everything."""
  rng, params = np.random.default_rng(0), layouts.unbox(jax.jit(of.init)(jax.random.key(0)))
  return jax.tree.map(
    lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), jax.device_get(params)
  )


def places(layout):
  return layouts.shardings(train.boxed_weights(model(layout)), layout)


@functools.cache
def inputs(layout=None):
  """Weights and eight rows; on a layout, placed by it."""
  params, batch = weights(model()), batches.pack(rows(), SHAPE)
  if layout is None:
    return params, batch
  return jax.device_put(params, places(layout)), train.place_batch(batch, layout)


@functools.cache
def loss_and_grad(layout=None):
  """Compiled (params, batch, key) -> (loss, gradient). On a layout the gradient lies as the weights do."""

  def function(params, batch, key):
    return jax.value_and_grad(train.loss_fn)(params, model(layout), batch, key, SIGMA)

  out = None if layout is None else (None, places(layout))
  return jax.jit(function, out_shardings=out).lower(*inputs(layout), KEY).compile()


def test_packed_equals_alone():
  """The loss and gradient of packed rows are those of each clip in a row of its own; other neighbours change
  nothing.
  """
  params, _ = inputs()
  clips = [c for row in rows()[:2] for c in row]
  packed = batches.pack([clips[:3], clips[3:]] + [[]] * 6, SHAPE)
  alone = batches.pack([[c] for c in clips] + [[]] * (8 - len(clips)), SHAPE)
  mixed = batches.pack([clips[2:], clips[:2]] + [[]] * 6, SHAPE)
  results = [loss_and_grad()(params, b, KEY) for b in (packed, alone, mixed)]
  for loss, grad in results[1:]:
    np.testing.assert_allclose(loss, results[0][0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(results[0][1]), strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()))
  # clips that see each other
  other = dataclasses.replace(packed, segment_BL=np.minimum(packed.segment_BL, 1))
  assert abs(float(loss_and_grad()(params, other, KEY)[0]) - float(results[0][0])) > 1e-4


def layout_of(**axes):
  """A layout on as many of the 8 devices as these axes have."""
  devices = jax.devices()[: math.prod(axes.values())]
  return layouts.Layout(layouts.make_mesh(**{"data": 1, **axes}, devices=devices))


def assert_same(tree, reference):
  """Leaf by leaf, within 1e-5 of the leaf's maximum; a leaf of zeros would show nothing."""
  for leaf, (path, wanted) in zip(jax.tree.leaves(tree), jax.tree.leaves_with_path(reference), strict=True):
    largest = np.abs(wanted).max()
    assert largest > 0, path
    np.testing.assert_allclose(leaf, wanted, rtol=0, atol=1e-5 * largest, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
  ("axes", "query", "hidden"),
  [
    ({"data": 2}, (2, 32, 2, 16), (4, 48, 64)),
    ({"fsdp": 2}, (2, 16, 2, 16), (4, 48, 64)),
    ({"context": 2}, (2, 16, 2, 16), (8, 24, 64)),
    ({"tensor": 2}, (2, 32, 1, 16), (8, 48, 32)),
    ({"fsdp": 2, "context": 2}, (2, 8, 2, 16), (4, 24, 64)),
    ({"context": 2, "tensor": 2}, (2, 16, 1, 16), (8, 24, 32)),  # more devices than heads
    ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 16, 1, 16), (2, 48, 32)),
  ],
  ids=["data", "fsdp", "context", "tensor", "fsdp-context", "context-tensor", "data-fsdp-tensor"],
)
def test_sharded_equals_unsharded(axes, query, hidden):
  """Loss and gradient of weights, rows, tokens and heads cut over a mesh are those of one device.

  query: what a device holds of that weight, and of its gradient. hidden: what it computes of the mlp's
  activations; the whole of them, as in the program for one device, is nowhere in the compiled program.
  """
  layout = layout_of(**axes)
  params, batch = inputs(layout)
  loss, grads = loss_and_grad(layout)(params, batch, KEY)
  wanted, reference = loss_and_grad()(*inputs(), KEY)
  np.testing.assert_allclose(loss, wanted, rtol=1e-6)
  assert_same(grads, reference)
  for tree in (params, grads):
    assert tree["dit"]["blocks"]["self"]["query"].addressable_shards[0].data.shape == query
  part, whole = "f32[{},{},{}]".format(*hidden), "f32[8,48,64]"
  assert part in loss_and_grad(layout).as_text() and whole not in loss_and_grad(layout).as_text()
  assert whole in loss_and_grad().as_text()


def test_a_wrong_gradient_is_not_the_same():
  """The comparison above sees a leaf that is off by 1e-4, tokens that are left out, and clips that see each
  other.
  """
  params, batch = inputs()
  reference = loss_and_grad()(params, batch, KEY)[1]
  assert_same(reference, reference)
  scaled = jax.tree.map(np.array, reference)
  scaled["dit"]["blocks"]["mlp"]["in"] *= 1.0001
  left_out, mixed = batch.segment_BL.copy(), np.minimum(batch.segment_BL, 1)
  left_out[:, SHAPE.length // 2 :] = 0
  others = (dataclasses.replace(batch, segment_BL=segment_BL) for segment_BL in (left_out, mixed))
  for wrong in (scaled, *(loss_and_grad()(params, other, KEY)[1] for other in others)):
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
      assert_same(wrong, reference)


@functools.cache
def setting(layout=None, tx=None):
  """(layout, tx, compiled step), by default with Muon on one device; few compilations serve all tests."""
  layout = layout or layout_of(data=1)
  muon = optim.OptimConfig(steps=60, warmup=5, learning_rate=5e-3, name="muon")
  tx = tx or optim.optimizer(muon, train.boxed_weights(model()))
  step, key = train.jit_step(model(layout), tx, ema_decay=0.9, sigma=SIGMA, spike=10.0), jax.random.key(1)

  def run(state, batch):
    return step(jax.tree.map(jnp.copy, state), batch, key)  # it donates the State

  return layout, tx, run


def start(layout, tx):
  return train.init_state(model(layout), tx, jax.random.key(0)), train.place_batch(
    batches.pack(rows(), SHAPE), layout
  )


def test_a_bad_update_changes_nothing_but_the_count():
  """A batch with a NaN leaves weights, EMA and optimiser to the bit; the step goes on; a good one after it
  trains.
  """
  layout, tx, run = setting()
  state, good = start(layout, tx)
  broken = dataclasses.replace(good, tokens_BLP=good.tokens_BLP.at[:, 3].set(np.nan))
  after, metrics = run(state, broken)
  assert int(metrics["bad"]) == 1 and int(after.bad) == 1 and int(after.step) == 1
  for part in ("params", "ema", "opt"):
    for a, b in zip(
      jax.tree.leaves(getattr(after, part)), jax.tree.leaves(getattr(state, part)), strict=True
    ):
      np.testing.assert_array_equal(a, b)
  assert int(metrics["not_finite"]) == 1 and not int(metrics["spike"]) and np.isnan(after.history).all()
  later, metrics = run(run(state, good)[0], good)
  assert (
    int(metrics["bad"]) == 0
    and float(jnp.abs(later.params["dit"]["velocity"] - state.params["dit"]["velocity"]).max()) > 0
  )


def test_a_spike_changes_nothing_but_the_count():
  """A gradient ten times as large as the recent ones leaves weights, EMA and optimiser to the bit."""
  layout, tx, run = setting()
  state, batch = start(layout, tx)
  state, _ = run(state, batch)  # the first is made at learning rate 0
  _, metrics = run(state, batch)
  usual = np.array([[metrics["loss"]], [metrics["grad_norm"]]], np.float32)
  for share, spike in ((1 / 9, 0), (1 / 11, 1)):
    history = np.repeat(usual * np.array([[1], [share]], np.float32), optim.WINDOW, 1)
    after, metrics = run(dataclasses.replace(state, history=history), batch)
    assert int(metrics["spike"]) == int(after.bad) == spike and not int(metrics["not_finite"])
    for part in ("params", "ema", "opt"):
      pairs = zip(jax.tree.leaves(getattr(after, part)), jax.tree.leaves(getattr(state, part)), strict=True)
      assert all(np.array_equal(a, b) for a, b in pairs) == bool(spike)


@pytest.mark.parametrize("axes", [{"data": 1}, {"data": 2, "fsdp": 2}], ids=["one device", "data-fsdp"])
def test_micro_steps_are_one_step(axes):
  """Gradients of parts of the rows add up to those of all rows, though the parts have unlike many tokens."""
  layout = layout_of(**axes)
  (params, batch), of = inputs(layout), model(layout)
  run = jax.jit(functools.partial(train.loss_and_grads, model=of, sigma=SIGMA), static_argnames="micro_steps")
  loss, grads = run(params, batch=batch, key=KEY, micro_steps=1)
  parts_loss, parts = run(params, batch=batch, key=KEY, micro_steps=2)
  np.testing.assert_allclose(parts_loss, loss, rtol=1e-6)
  assert_same(parts, grads)


def test_one_row_on_all_devices():
  """A row that fsdp and context cut together has the loss and gradient of one device."""
  one = batches.pack(rows()[1:2], SHAPE)
  layout = layout_of(fsdp=4, context=2)
  placed = train.place_batch(one, layout)
  assert placed.tokens_BLP.addressable_shards[0].data.shape[:2] == (1, 6)

  def run(layout, batch):
    function = functools.partial(train.loss_fn, model=model(layout), key=KEY, sigma=SIGMA)
    params = inputs()[0] if layout is None else jax.device_put(inputs()[0], places(layout))
    return jax.jit(jax.value_and_grad(lambda params, batch: function(params, batch=batch)))(params, batch)

  (loss, grads), (wanted, reference) = run(layout, placed), run(None, one)
  np.testing.assert_allclose(loss, wanted, rtol=1e-6)
  assert_same(grads, reference)


def test_tokens_are_dealt_to_devices():
  """Each device of a row gets blocks of all of it; the law of the checksum holds in any order."""
  layout = layout_of(context=4)
  order = train.dealing((1, 1536), layout)
  np.testing.assert_array_equal(order[:256], [*range(128), *range(512, 640)])
  np.testing.assert_array_equal(np.sort(order), np.arange(1536))
  assert train.dealing((1, 1000), layout) is None and train.dealing((1, 1536), layout_of(fsdp=1)) is None
  long = batches.RowShape(length=1536, clips=4, text=24)
  batch = batches.pack([[clip(1, (8, 8, 8)), clip(2, (5, 8, 8))]], long)
  placed, loss = train.place_batch(batch, layout), train.loss_fn
  np.testing.assert_array_equal(np.asarray(placed.segment_BL), batch.segment_BL[:, order])
  assert int(train.checksum(placed, layout)) == int(train.checksum(batch))
  assert int(train.checksum(placed)) != int(train.checksum(batch))
  run = functools.partial(jax.jit(loss, static_argnames=("model", "sigma")), sigma=SIGMA, key=KEY)
  params = inputs()[0]
  ours = run(jax.device_put(params, places(layout)), model=model(layout), batch=placed)
  np.testing.assert_allclose(ours, run(params, model=model(), batch=batch), rtol=1e-5)


def test_weights_in_bfloat16_without_a_running_mean():
  """They are stored in it, learn as those in float32 do, and no mean is kept."""
  of = dataclasses.replace(model(), param_dtype="bfloat16")
  cfg = optim.OptimConfig(steps=60, warmup=5, learning_rate=5e-3, name="adamw", moment_dtype="bfloat16")
  tx, losses = optim.optimizer(cfg, train.boxed_weights(of)), []
  state = train.init_state(of, tx, jax.random.key(0), ema=False)
  assert state.ema == {} and {x.dtype.name for x in jax.tree.leaves(state.params)} == {"bfloat16"}
  assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, train.abstract_state(of, tx, ema=False))
  step = train.jit_step(of, tx, ema_decay=0.0, sigma=SIGMA)
  batch = batches.pack(rows(), SHAPE)
  for _ in range(50):
    state, metrics = step(state, batch, jax.random.key(1))
    losses.append(float(metrics["loss"]))
  assert state.ema == {} and losses[-1] < 0.75 * losses[0], losses[::10]


def test_two_steps_save_restore_two_steps(tmp_path):
  """4 steps equal 2 + save + restore on another mesh + 2, in weights, EMA and optimiser.

  By descent with momentum: Adam and Muon make a difference of rounding in a gradient near 0 as large as any
  other.
  """
  names, tx = [field.name for field in dataclasses.fields(train.State)], optax.sgd(0.1, momentum=0.9)
  layout, _, run = setting(tx=tx)
  state, batch = start(layout, tx)
  for step in range(1, 5):
    state, _ = run(state, batch)
    if step == 2:
      saved = checkpoint.Checkpoints(tmp_path)
      saved.save(2, {"state": {name: getattr(state, name) for name in names}}, {"step": 2})
      saved.close()
  layout, _, run = setting(layout_of(fsdp=2, context=2, tensor=2), tx)
  target = train.abstract_state(model(layout), tx)
  wanted = {"state": {name: getattr(target, name) for name in names}}
  restored = checkpoint.Checkpoints(tmp_path).restore(2, wanted)["state"]
  batch = start(layout, tx)[1]

  def two_more(restored):
    again = train.State(**restored)
    for _ in range(2):
      again, _ = run(again, batch)
    return again

  again = two_more(restored)
  without_momentum = two_more(restored | {"opt": jax.tree.map(jnp.zeros_like, restored["opt"])})
  assert int(again.step) == 4
  for part in ("params", "ema", "opt"):
    assert_same(getattr(again, part), getattr(state, part))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
      assert_same(getattr(without_momentum, part), getattr(state, part))


def test_overfits_a_handful_of_clips():
  """Sixty updates on one batch at a high rate bring the loss well down: the sign of the velocity and the text
  are wired right.
  """
  layout, tx, run = setting()
  (state, batch), losses = start(layout, tx), []
  for _ in range(60):
    state, metrics = run(state, batch)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.6 * losses[0], losses[::10]


@dataclasses.dataclass(frozen=True)
class Held:
  """A layout of which only the rows that this process's devices hold are known, as (first, after)."""

  rows: tuple

  def fitted(self, shape, *axes):
    return self

  def addressable_devices_indices_map(self, shape):
    return {number: (slice(*held),) for number, held in enumerate(self.rows)}


@pytest.mark.parametrize(
  ("rows", "part"),
  [
    (((0, 2), (2, 4)), (0, 4)),
    (((12, 14), (14, 16)), (3, 4)),
    (((4, 8), (4, 8)), (1, 4)),
    (((None,), (None,)), (0, 1)),
    (((0, 2), (8, 10)), (0, 1)),
  ],
)
def test_a_process_loads_the_rows_that_its_devices_hold(rows, part):
  """Of 16: a quarter each; the same where others hold other tokens of it; all, where rows are not cut, or not
  in one piece.
  """
  assert train.part_of_rows(Held(rows), 16) == part


def test_a_checksum_is_of_the_batch_however_it_is_cut():
  two = [layouts.Layout(layouts.make_mesh(**axes)) for axes in ({}, {"fsdp": 2, "context": 2})]
  whole, cut = (
    int(jax.jit(train.checksum)(train.place_batch(batches.pack(rows(), SHAPE), layout))) for layout in two
  )
  assert whole == cut
  other = batches.pack(rows(), SHAPE)
  other.tokens_BLP[0, [0, 1]] = other.tokens_BLP[0, [1, 0]]
  assert int(train.checksum(other)) != whole


@pytest.mark.parametrize("kind", ["ids", "embeddings", "condition"])
def test_what_is_checked_beforehand_is_what_runs(kind):
  """batch_shapes has the arrays, dtypes and shardings of a packed, placed batch; a step lowers from them."""
  on_mesh = layout_of(fsdp=2, context=2)
  channels = {"conditioning": "channels", "cond_channels": 2} if kind == "condition" else {}
  whole = t2v.Model(dataclasses.replace(TINY, **channels), TEXT if kind == "ids" else None, on_mesh)
  clips = [[dataclasses.replace(c) for c in row] for row in rows()]
  for c in (c for row in clips for c in row):
    if kind != "ids":
      c.texts = [np.zeros((len(c.texts[0]), TINY.text_width), np.float32)]
    if channels:
      c.cond_LQ = np.zeros((len(c.tokens_LP), whole.dit.values_cond), np.float32)
  shapes = train.batch_shapes(whole, len(clips), SHAPE)
  placed = train.place_batch(batches.pack(clips, SHAPE), on_mesh)
  structs = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), placed
  )
  assert jax.tree.structure(shapes) == jax.tree.structure(structs)
  assert jax.tree.leaves(shapes) == jax.tree.leaves(structs)
  tx = optax.sgd(0.1)
  step = train.jit_step(whole, tx, ema_decay=0.9, sigma=SIGMA)
  state, metrics = step.lower(train.abstract_state(whole, tx), shapes, jax.random.key(0)).out_info
  assert metrics["loss"].shape == () and int(np.prod(state.step.shape)) == 1
