"""Laws of the pipeline: batches are a function of (index, seed, cursor), for any hosts, threads or damage."""

import dataclasses
import itertools

import numpy as np
import pytest

from data.loader import CAPTION, batches, draw_uniform
from data.mixture import Mixture
from data.plan import Cursor, Plan
from data.records import Record, RecordIndex, RecordWriter
from sora_jax.batch import RowShape
from sora_jax.errors import BadInput
from sora_jax.patches import unpatchify

COUNT, CHANNELS, NULL = 70, 3, np.array([1], np.int32)
SHAPE = RowShape(length=40, clips=6, text=48)


def make_record(i, embedded=False, conditions=False):
  """Latents that encode the record and the position: i + t / 10 + y / 100, which bfloat16 rounds."""
  t, h, w = (1, 2, 3)[i % 3], (2, 3)[i % 2], (2, 3, 4)[i // 3 % 3]
  latents = i + np.arange(t).reshape(-1, 1, 1, 1) / 10 + np.arange(h).reshape(-1, 1, 1) / 100
  latents = np.broadcast_to(latents, (t, h, w, CHANNELS))
  ids = np.full(2 + i % 7, 100 + i, np.int32)
  text = ids[:, None] * np.ones((1, 5)) if embedded else None
  return Record(
    latents,
    ids,
    f"clip {i}",
    f"{i:03d}.mp4",
    0.0,
    8.0 if i % 2 else 24.0,
    ("ours", "theirs")[i % 2],
    text,
    -latents if conditions else None,
  )


def write(directory, embedded=False, conditions=False, **changes):
  with RecordWriter(directory) as writer:
    for i in range(COUNT):
      writer.add(dataclasses.replace(make_record(i, embedded, conditions), **changes))
    null_SE = np.ones((1, 5)) if embedded else None
    return writer.finish(
      {"latent_channels": CHANNELS, "conditions": conditions}, null_text=NULL, null_text_SE=null_SE
    )


@pytest.fixture(scope="module")
def index(tmp_path_factory):
  return write(tmp_path_factory.mktemp("records"))


def make_plan(index, rows=6, seed=3, **options):
  return Plan(
    index.rows, rows_per_step=rows, shape=SHAPE, patch=(1, 1, 1), seed=seed, window_clips=100, **options
  )


def take(count, index, plan=None, **options):
  return list(itertools.islice(batches(index, plan or make_plan(index), seed=3, **options), count))


def arrays(batch):
  return {k: v for k, v in vars(batch).items() if v is not None}


def assert_same(a, b):
  assert arrays(a).keys() == arrays(b).keys()
  for name, array in arrays(a).items():
    np.testing.assert_array_equal(array, arrays(b)[name], name)


def clips(batch):
  """{(uid, epoch): arrays} of the clips of a batch, whatever their positions."""
  by_key = {}
  for b, g in np.argwhere(batch.size_BG3[..., 0] > 0):
    mine = batch.segment_BL[b] == g + 1
    span = batch.prompt_BL[b][mine]
    uid = int(batch.uid_BG2[b, g, 0]) << 32 | int(batch.uid_BG2[b, g, 1])
    by_key[uid, int(batch.epoch_BG[b, g])] = {
      "tokens": batch.tokens_BLP[b, mine],
      "coords": batch.coords_BL3[b, mine],
      "given": batch.given_BL[b, mine],
      "text": (batch.text_BS if batch.text_BSE is None else batch.text_BSE)[b, batch.prompt_BS[b] == span[0]],
      "size": tuple(batch.size_BG3[b, g]),
      "fps": batch.fps_BG[b, g],
      "source": batch.source_BG[b, g],
    }
  return by_key


def test_an_epoch_holds_every_record_as_it_was_written(index):
  by_key = {}
  for batch, _ in batches(index, make_plan(index), seed=3, caption_dropout=0, epochs=2):
    assert batch.tokens_BLP.shape == (6, 40, CHANNELS) and batch.tokens_BLP.dtype == np.float32
    new = clips(batch)
    assert not new.keys() & by_key.keys()
    by_key |= new
  records = {record.uid: record for record in map(make_record, range(COUNT))}
  assert by_key.keys() == set(itertools.product(records, range(2)))
  for (uid, _), clip in by_key.items():
    record = records[uid]
    np.testing.assert_allclose(
      unpatchify(clip["tokens"], clip["size"], (1, 1, 1)), record.latents_THWC, rtol=2**-8
    )
    np.testing.assert_array_equal(clip["text"], record.text_ids_S)
    assert clip["fps"] == record.fps and index.header["sources"][clip["source"]] == record.source
    assert not clip["given"].any()


@pytest.mark.parametrize("hosts", [1, 2, 3, 6])
def test_hosts_have_slices_of_the_same_batches(index, hosts):
  """They also resume, with the next batch, from a cursor of another number of hosts."""
  whole = take(12, index, given={"first": 0.4})
  cursor = Cursor.from_json(whole[4][1].to_json())
  parts = [
    take(7, index, cursor=cursor, host=h, hosts=hosts, given={"first": 0.4}, threads=1 + h)
    for h in range(hosts)
  ]
  for step, (batch, after) in enumerate(whole[5:]):
    assert all(part[step][1] == after for part in parts)
    for name, array in arrays(batch).items():
      np.testing.assert_array_equal(
        np.concatenate([arrays(part[step][0])[name] for part in parts]), array, name
      )
  with pytest.raises(BadInput, match="rows a step: 6; a multiple of the 4 hosts"):
    take(1, index, hosts=4)


def test_draws_depend_on_neither_neighbours_nor_rows(index):
  """A clip has the same caption and mask in an epoch in any plan; another epoch or seed draws again."""

  def draw(seed, rows):
    texts_and_given = {}
    plan = make_plan(index, rows, seed=rows)
    for batch, _ in batches(index, plan, seed=seed, caption_dropout=0.3, given={"first": 0.5}, epochs=8):
      for key, clip in clips(batch).items():
        texts_and_given[key] = tuple(clip["text"]), clip["given"].any()
    return texts_and_given

  drawn = draw(3, 6)
  assert len(drawn) == 8 * COUNT and drawn == draw(3, 4) and drawn != draw(4, 6)
  dropped = np.array([text == (1,) for text, _ in drawn.values()])
  assert 0.2 < dropped.mean() < 0.4
  of_first = {key[1]: value[0] for key, value in drawn.items() if key[0] == make_record(0).uid}
  assert len(set(of_first.values())) == 2
  several = {record.uid for record in map(make_record, range(COUNT)) if len(record.latents_THWC) > 1}
  given = np.array([given for (uid, _), (_, given) in drawn.items() if uid in several])
  assert 0.4 < given.mean() < 0.6
  assert not any(given for (uid, _), (_, given) in drawn.items() if uid not in several)
  assert abs(np.corrcoef(dropped[[uid in several for uid, _ in drawn]], given)[0, 1]) < 0.2


def test_draws_are_uniform():
  u = draw_uniform(0, CAPTION, np.arange(20_000, dtype=np.uint64), np.zeros(20_000, np.int64))
  np.testing.assert_allclose(np.histogram(u, 10, (0, 1))[0], 2000, atol=200)


def test_the_first_latent_frame_is_given_whole(index):
  for batch, _ in take(5, index, given={"first": 1.0}):
    for clip in clips(batch).values():
      np.testing.assert_array_equal(clip["given"], (clip["coords"][:, 0] == 0) & (clip["size"][0] > 1))


def test_time_scale(index):
  """With base_fps=8, t counts frames of that rate: a frame of a clip of 24 a second adds a third."""
  for (plain, _), (scaled, _) in zip(take(3, index), take(3, index, base_fps=8.0), strict=True):
    plain, scaled = clips(plain), clips(scaled)
    for key, clip in scaled.items():
      np.testing.assert_allclose(clip["coords"], plain[key]["coords"] * [8 / clip["fps"], 1, 1], rtol=1e-6)
    assert any(clip["fps"] == 24 and clip["coords"][:, 0].max() > 0 for clip in scaled.values())


def test_embeddings_and_their_padding(tmp_path, index):
  """Texts are embeddings. Those shorter than text_pad are followed by a zero, which the plan counts."""
  embedded = write(tmp_path, embedded=True)
  ((batch, _),) = take(1, embedded, embedded=True, caption_dropout=0)
  assert batch.text_BS is None and batch.text_BSE.shape == (6, 48, 5)
  for clip in clips(batch).values():
    assert len(clip["text"]) <= 8 and (clip["text"] >= 100).all()
  ((batch, _),) = take(1, embedded, make_plan(embedded, text_pad=12), embedded=True, caption_dropout=0.5)
  for clip in clips(batch).values():
    assert 2 <= len(clip["text"]) <= 9 and (clip["text"][-1] == 0).all() and (clip["text"][:-1] != 0).all()
  with pytest.raises(BadInput, match="hold no text embeddings"):
    take(1, index, embedded=True)


def test_channels_of_an_image(tmp_path, index):
  """An image as channels: four mark the given frames, then come the latents; zeros in padding."""
  ((batch, _),) = take(1, write(tmp_path, conditions=True), cond_channels=4 + CHANNELS)
  real = batch.segment_BL > 0
  assert (
    batch.cond_BLQ.shape == (*real.shape, 4 + CHANNELS)
    and not batch.cond_BLQ[~real].any()
    and not batch.given_BL.any()
  )
  np.testing.assert_array_equal(batch.cond_BLQ[real][:, 4:], -batch.tokens_BLP[real])
  np.testing.assert_array_equal(
    batch.cond_BLQ[real][:, :4], np.repeat(batch.coords_BL3[real][:, :1] == 0, 4, 1)
  )
  with pytest.raises(BadInput, match="do not hold what this model is given"):
    take(1, index, cond_channels=4 + CHANNELS)


def damage(directory, names):
  """Flips a byte in the latents of some records."""
  index = RecordIndex.open(directory)
  (path,) = directory.glob("*.array_record")
  content = bytearray(path.read_bytes())
  for name in names:
    at = content.index(name.encode())
    content[at] ^= 1
  path.write_bytes(content)
  return index


def test_damaged_records_are_named_and_become_padding(tmp_path):
  """Their neighbours do not change; the next epoch does not count them again; one too many stops the run."""
  good = write(tmp_path)
  before = [clips(batch) for batch, _ in batches(good, make_plan(good), seed=3, epochs=2)]
  index, lines = damage(tmp_path, ["007.mp4", "031.mp4"]), []
  after = [
    clips(batch) for batch, _ in batches(index, make_plan(index), seed=3, epochs=2, on_damage=lines.append)
  ]
  lost = {make_record(7).uid, make_record(31).uid}
  assert len(before) == len(after)
  for a, b in zip(before, after, strict=True):
    assert b.keys() == {key for key in a if key[0] not in lost}
    for key, clip in b.items():
      np.testing.assert_array_equal(clip["tokens"], a[key]["tokens"])
      np.testing.assert_array_equal(clip["text"], a[key]["text"])
  assert len(lines) == 2 and "007.mp4" in "".join(lines) and "031.mp4" in "".join(lines)
  with pytest.raises(
    BadInput, match=r"2 records are damaged, at most 1 are skipped \(max_damaged\); the last: "
  ):
    take(30, index, max_damaged=1, on_damage=lines.append)


def test_a_host_without_clips_has_empty_rows(index):
  """At the end of the last epoch, the batch of such a host has the usual shape and is all padding."""
  last = [list(batches(index, make_plan(index), seed=3, epochs=1, host=h, hosts=6))[-1][0] for h in range(6)]
  empty = [batch for batch in last if not batch.segment_BL.any()]
  assert empty and len(empty) < 6
  for batch in empty:
    assert batch.tokens_BLP.shape == (1, 40, CHANNELS) and batch.text_BS.shape == (1, 48)
    assert not any(np.any(array) for array in arrays(batch).values())


def test_an_error_of_the_plan_comes_through_the_threads(index):
  other = dataclasses.replace(take(1, index)[0][1], plan="another")
  with pytest.raises(BadInput, match="cursor: it belongs to another index"):
    take(1, index, cursor=other)


def test_a_mixture_of_directories(tmp_path, index):
  """Clips of both are as written, in their shares, with their own sources; hosts have slices and resume."""
  mixture = Mixture([index, write(tmp_path, source="film")])
  plan = make_plan(mixture, weights=(1, 3))
  steps = take(12, mixture, plan, caption_dropout=0)
  sources = np.concatenate([batch.source_BG[batch.size_BG3[..., 0] > 0] for batch, _ in steps])
  assert mixture.header["sources"] == ["ours", "theirs", "film"] and set(sources) == {0, 1, 2}
  assert 0.65 < (sources == 2).mean() < 0.85
  records = {record.uid: record for record in map(make_record, range(COUNT))}
  for batch, _ in steps:
    for (uid, _), clip in clips(batch).items():
      np.testing.assert_allclose(
        unpatchify(clip["tokens"], clip["size"], (1, 1, 1)), records[uid].latents_THWC, rtol=2**-8
      )
  for host in range(2):
    resumed = take(4, mixture, plan, cursor=steps[3][1], host=host, hosts=2, caption_dropout=0)
    for (batch, cursor), (whole, after) in zip(resumed, steps[4:8], strict=True):
      assert cursor == after
      for name, array in arrays(whole).items():
        np.testing.assert_array_equal(arrays(batch)[name], array[3 * host : 3 * host + 3], name)


def test_an_index_of_other_records_stops_the_run(tmp_path):
  """The records are not damaged, but they are not those of the index: none is skipped."""
  write(tmp_path / "a")
  write(tmp_path / "b", start=1.0)
  (shard,) = (path.name for path in (tmp_path / "a").glob("*.array_record"))
  (tmp_path / "b" / shard).write_bytes((tmp_path / "a" / shard).read_bytes())
  lines = []
  with pytest.raises(BadInput, match="b: the index does not match its records: for record .* it holds"):
    take(1, RecordIndex.open(tmp_path / "b"), on_damage=lines.append)
  assert not lines


def test_captions_one_after_another(tmp_path):
  """Each latent frame reads the caption of its time; a dropped text drops them all. A row has room for it."""
  spans = np.array([(2, 0), (3, 1), (4, 3)], np.int32)
  ids = np.arange(9, dtype=np.int32) + 10
  latents = np.zeros((5, 2, 2, CHANNELS))
  record = dataclasses.replace(make_record(0), latents_THWC=latents, text_ids_S=ids, text_spans_N2=spans)
  single = dataclasses.replace(make_record(3), latents_THWC=latents[:1], text_ids_S=ids[:2])
  with RecordWriter(tmp_path) as writer:
    writer.add(record)
    writer.add(single)
    index = writer.finish({"latent_channels": CHANNELS, "conditions": False}, null_text=NULL)
  assert sorted(index.rows["text_tokens"]) == [2, 9 + 3]  # each of three may be followed by a zero
  for pad, zero in ((None, []), (20, [0])):
    ((batch, _),) = take(1, index, make_plan(index, rows=1, text_pad=pad), caption_dropout=0.0)
    row = {name: array[0] for name, array in arrays(batch).items()}
    for number in np.flatnonzero(row["size_BG3"][:, 0] == 5) + 1:
      read_L = row["prompt_BL"][row["segment_BL"] == number].reshape(5, 4)
      assert (read_L - read_L[0, 0]).tolist() == [4 * [n] for n in (0, 1, 1, 2, 2)]
      texts = [row["text_BS"][row["prompt_BS"] == n].tolist() for n in np.unique(read_L)]
      assert texts == [[10, 11] + zero, [12, 13, 14] + zero, [15, 16, 17, 18] + zero]
  ((batch, _),) = take(1, index, make_plan(index, rows=1), caption_dropout=1.0)
  assert set(batch.text_BS[batch.prompt_BS > 0]) == set(NULL)
