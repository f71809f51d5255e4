"""Data: what is read right, what is refused and how clearly, and that drifts are drifts."""

import io
import random
import zipfile

import numpy as np
import pytest

from acclimate import data
from acclimate.errors import AcclimateError, BadInput, WrongUse

SEVERITIES = (1, 2, 3, 4, 5)


@pytest.fixture(scope="module")
def digits():
    return data.digits()


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def npz(tmp_path, **arrays):
    return save(tmp_path / "data.npz", **arrays)


def refused(path, *words, error=BadInput, **options):
    """load() raises `error`, whose text has each of `words`."""
    with pytest.raises(error) as caught:
        data.load(path, **options)
    text = str(caught.value)
    for word in words:
        assert str(word) in text, text
    return caught.value


X = np.arange(6 * 2 * 4 * 4, dtype=np.float32).reshape(6, 2, 4, 4)
Y = np.array([0, 1, 2, 0, 1, 2])


# --- the embedded digits --------------------------------------------------------------------------


def test_digits(digits):
    assert digits.x.shape == (1347, 1, 8, 8) and digits.x_val.shape == (450, 1, 8, 8)
    assert digits.x.dtype == np.float32 and digits.y.dtype == np.int64
    assert digits.x.min() == 0 and digits.x.max() == 1
    assert digits.classes == 10 and digits.class_names == tuple("0123456789") and len(digits) == 1347
    counts = np.bincount(digits.y) / np.bincount(np.r_[digits.y, digits.y_val])
    assert np.allclose(counts, 0.75, atol=0.01)
    assert np.bincount(np.r_[digits.y, digits.y_val]).tolist() == [
        178,
        182,
        177,
        183,
        181,
        182,
        181,
        179,
        174,
        180,
    ]


def test_digits_are_small_and_free_of_pickle():
    asset = data.resources.files("acclimate").joinpath("assets/digits.npz").read_bytes()
    assert len(asset) < 100_000
    with np.load(io.BytesIO(asset), allow_pickle=False) as stored:
        assert stored["images"].dtype == np.uint8 and stored["images"].max() == 16


def test_digits_equal_their_source(digits):
    source = pytest.importorskip("sklearn.datasets").load_digits()
    with data.resources.files("acclimate").joinpath("assets/digits.npz").open("rb") as stream:
        stored = np.load(stream)
        assert np.array_equal(stored["images"], source.images) and np.array_equal(
            stored["labels"], source.target
        )


def test_what_is_drawn_never_changes(digits):
    """Numbers that a reader of a report must find again, with any numpy."""
    assert digits.y_val[:20].tolist() == [1, 1, 6, 7, 6, 9, 8, 9, 3, 5, 2, 2, 6, 3, 3, 6, 5, 9, 1, 3]
    assert not np.array_equal(data.digits(seed=1).y_val, digits.y_val)
    grey = np.full((1, 1, 2, 2), 0.5, np.float32)
    assert data.gaussian_noise(grey, 1, 7).ravel() == pytest.approx(
        [0.583285, 0.598866, 0.655311, 0.423988], abs=1e-6
    )
    assert data.remap_labels(np.arange(10), 10, 7).tolist() == [8, 0, 6, 5, 3, 2, 7, 1, 9, 4]


# --- .npz -----------------------------------------------------------------------------------------


def test_npz_as_the_model_takes_it(tmp_path):
    got = data.load(npz(tmp_path, x=X, y=Y, x_val=X[:2], y_val=Y[:2]), input_shape=(2, 4, 4))
    assert np.array_equal(got.x, X) and np.array_equal(got.y, Y) and got.y.dtype == np.int64
    assert np.array_equal(got.x_val, X[:2]) and np.array_equal(got.y_val, Y[:2])
    assert got.classes == 3 and got.name == "data"


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int8, np.int16, np.uint16, bool, ">f4"])
def test_other_numbers_become_float32(tmp_path, dtype):
    x = (X % 2).astype(dtype)
    assert data.load(npz(tmp_path, x=x, y=Y)).x.dtype == np.float32
    assert np.array_equal(data.load(npz(tmp_path, x=x, y=Y)).x, X % 2)


def test_tokens_stay_whole(tmp_path):
    assert data.load(npz(tmp_path, x=np.ones((6, 5), np.int64), y=Y)).x.dtype == np.int64


@pytest.mark.parametrize("shape", [None, (3, 4, 5)])
def test_uint8_images_are_turned_and_scaled(tmp_path, shape):
    images = np.random.RandomState(0).randint(0, 256, (6, 4, 5, 3)).astype(np.uint8)
    expected = images.transpose(0, 3, 1, 2).astype(np.float32) / 255
    got = data.load(npz(tmp_path, x=images, y=Y), input_shape=shape)
    assert got.x.shape == (6, 3, 4, 5) and np.allclose(got.x, expected) and got.x.flags.c_contiguous
    turned = data.load(npz(tmp_path, x=images.transpose(0, 3, 1, 2), y=Y), input_shape=shape)
    assert np.array_equal(turned.x, got.x)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    scaled = data.load(npz(tmp_path, x=images, y=Y), input_shape=shape, mean=mean, std=std)
    assert np.allclose(
        scaled.x, (expected - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1)), atol=1e-6
    )
    assert np.allclose(
        data.load(npz(tmp_path, x=images, y=Y), mean=0.5, std=0.5).x, expected * 2 - 1, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(1, 4, 5), (4, 5), (20,)])
@pytest.mark.parametrize("axes", [(6, 4, 5), (6, 4, 5, 1), (6, 1, 4, 5)])
def test_grey_images_serve_any_form_of_one_channel(tmp_path, shape, axes):
    images = np.arange(120, dtype=np.uint8)
    got = data.load(npz(tmp_path, x=images.reshape(axes), y=Y), input_shape=shape)
    assert got.x.shape == (6, *shape) and np.allclose(got.x.ravel(), images / 255)


def test_uint8_that_is_no_image_is_not_scaled(tmp_path):
    assert data.load(npz(tmp_path, x=np.full((6, 7), 200, np.uint8), y=Y)).x.max() == 200


def test_labels_in_all_their_forms(tmp_path):
    for y in (Y.astype(np.uint8), Y.astype(np.float32), Y[:, None], Y.astype(np.int16)):
        assert data.load(npz(tmp_path, x=X, y=y)).y.tolist() == Y.tolist()
    flags = data.load(npz(tmp_path, x=X, y=Y > 0))
    assert flags.y.tolist() == [0, 1, 1, 0, 1, 1]
    many = data.load(npz(tmp_path, x=X, y=np.eye(3, dtype=np.uint8)[Y]))
    assert many.y.dtype == np.float32 and many.y.shape == (6, 3) and many.classes == 3
    values = data.load(npz(tmp_path, x=X, y=np.linspace(0, 1, 6)[:, None]))
    assert values.y.shape == (6, 1) and values.y.dtype == np.float32


@pytest.mark.parametrize("kind", ["U", "S"])
def test_text_labels_become_sorted_classes(tmp_path, kind):
    words = np.array(["walk", "sit", "run", "sit", "walk", "run"]).astype(kind)
    got = data.load(npz(tmp_path, x=X, y=words, x_val=X[:1], y_val=words[1:2]))
    assert got.class_names == ("run", "sit", "walk") and got.y.tolist() == [2, 1, 0, 1, 2, 0]
    assert got.y_val.tolist() == [1]
    ordered = data.load(npz(tmp_path, x=X, y=words), class_names=("walk", "sit", "run", "lie"))
    assert ordered.y.tolist() == [0, 1, 2, 1, 0, 2] and ordered.classes == 4
    refused(npz(tmp_path, x=X, y=words), "not among", "run, walk", class_names=("sit",))


def test_class_names_of_the_file(tmp_path):
    got = data.load(npz(tmp_path, x=X, y=Y, class_names=np.array(["a", "b", "c"])))
    assert got.class_names == ("a", "b", "c") and got.y.tolist() == Y.tolist()
    refused(npz(tmp_path, x=X, y=Y, class_names=np.array(["a", "b"])), "above the last class", "2 classes")


def test_what_is_wrong_with_an_npz(tmp_path):
    refused(tmp_path / "none.npz", "no such file", "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    refused(tmp_path / "text.npz", "not an .npz", "5 bytes", "numpy.savez")
    (tmp_path / "empty.npz").write_bytes(b"")
    refused(tmp_path / "empty.npz", "not an .npz")
    (tmp_path / "x.parquet").write_bytes(b"1")
    refused(tmp_path / "x.parquet", "parquet", ".npz")
    refused(npz(tmp_path, inputs=X, y=Y), "no array 'x'", "inputs")
    refused(npz(tmp_path, x=X), "no array 'y'")
    refused(npz(tmp_path, x=X, y=Y, x_val=X), "no array 'y_val'")
    refused(npz(tmp_path, x=X, y=Y, y_val=Y), "no array 'x_val'")
    refused(npz(tmp_path, x=X, y=Y[:4]), "differ in length", "6 samples, 4 labels")
    refused(npz(tmp_path, x=X, y=Y, x_val=X, y_val=Y[:1]), "x_val and y_val", "6 samples, 1 labels")
    refused(npz(tmp_path, x=X, y=Y, x_val=X[:, :1], y_val=Y), "x and x_val differ", "(1, 4, 4)")
    refused(npz(tmp_path, x=X, y=Y, x_val=X, y_val=np.eye(6)), "y and y_val differ", "(6,)")
    refused(npz(tmp_path, x=X[:0], y=Y[:0]), "x is empty", "(0, 2, 4, 4)")
    refused(npz(tmp_path, x=X, y=Y[:0]), "y is empty")
    refused(npz(tmp_path, x=X.ravel(), y=Y), "axis", "reshape(len(x), -1)")
    refused(npz(tmp_path, x=np.float32(3), y=Y), "axis")
    refused(npz(tmp_path, x=X.astype(complex), y=Y), "complex128", "float32")
    refused(npz(tmp_path, x=np.array([["a", "b"]] * 6), y=Y), "not numbers")
    refused(npz(tmp_path, x=X, y=Y.astype("M8[s]")), "neither numbers nor text")
    refused(npz(tmp_path, x=X, y=np.array(["a"] * 6), x_val=X, y_val=Y), "different kinds")
    with zipfile.ZipFile(tmp_path / "raw.npz", "w") as archive:
        archive.writestr("x", b"123")
        archive.writestr("y", b"123")
    refused(tmp_path / "raw.npz", "not an array")


def test_values_that_are_not_finite(tmp_path):
    x = X.copy()
    x[4, 0, 0, 0], x[4, 1, 2, 2], x[5, 0, 1, 1] = np.nan, np.inf, -np.inf
    refused(npz(tmp_path, x=x, y=Y), "NaN or infinite", "first in row 4", "3 values in 2 of 6 rows")
    refused(npz(tmp_path, x=X, y=Y, x_val=x, y_val=Y), "x_val", "row 4")
    refused(npz(tmp_path, x=np.full((6, 2), 1e300), y=Y), "infinite")  # float64 beyond float32
    y = Y.astype(np.float32)
    y[3] = np.nan
    refused(npz(tmp_path, x=X, y=y), "y holds NaN", "row 3", "1 of 6")


def test_labels_that_are_no_classes(tmp_path):
    refused(npz(tmp_path, x=X, y=Y - 1), "negative", "first in row 0", "2 of 6", "-1")
    refused(npz(tmp_path, x=X, y=Y + 0.5), "not whole numbers", "0.5", "(N, 1) float32")
    refused(npz(tmp_path, x=X, y=Y.astype(np.uint64) + np.uint64(2**63)), "above the last class")


def test_python_objects_are_refused_and_never_run(tmp_path):
    ran = []

    class Trap:
        def __reduce__(self):
            return ran.append, (1,)

    np.savez(tmp_path / "trap.npz", x=X, y=np.array([Trap()] * 6, dtype=object))
    refused(tmp_path / "trap.npz", "y holds Python objects", "trap.npz")
    assert not ran
    np.savez(tmp_path / "other.npz", x=X, y=Y, notes=np.array([Trap()], dtype=object))
    assert len(data.load(tmp_path / "other.npz")) == 6 and not ran  # what is not asked for is not read


def test_a_shape_that_is_not_the_models(tmp_path):
    refused(npz(tmp_path, x=X, y=Y), "(2, 4, 4)", "(3, 4, 4)", input_shape=(3, 4, 4))
    refused(npz(tmp_path, x=X.reshape(6, 32), y=Y), "reshape(len(x), 2, 4, 4)", input_shape=(2, 4, 4))
    refused(npz(tmp_path, x=X, y=Y), "reshape(len(x), 32)", input_shape=(32,))
    refused(npz(tmp_path, x=X, y=Y, x_val=X[:, :1], y_val=Y), "x_val", "(1, 4, 4)", input_shape=(2, 4, 4))
    grey = np.zeros((6, 4, 4), np.uint8)
    refused(npz(tmp_path, x=grey, y=Y), "(1, 4, 4)", "(3, 4, 4)", input_shape=(3, 4, 4))
    refused(npz(tmp_path, x=np.zeros((6, 9, 9, 7), np.uint8), y=Y), "which axis")
    refused(
        npz(tmp_path, x=np.zeros((6, 9, 9, 4), np.uint8), y=Y), "channels", "(3, 9, 9)", input_shape=(3, 9, 9)
    )


def test_scaling_that_cannot_be(tmp_path):
    images = np.zeros((6, 4, 4, 3), np.uint8)
    refused(npz(tmp_path, x=X, y=Y), "uint8 images only", error=WrongUse, mean=0.5)
    refused(npz(tmp_path, x=X, y=Y), "uint8 images only", error=WrongUse, resize=True)
    refused(npz(tmp_path, x=images, y=Y), "mean needs", "2 for 3", error=WrongUse, mean=(0.5, 0.5))
    refused(npz(tmp_path, x=images, y=Y), "std must be above zero", error=WrongUse, std=(1.0, 0.0, 1.0))
    refused(npz(tmp_path, x=images, y=Y), "std needs", error=WrongUse, std=float("nan"))


def test_images_of_another_size(tmp_path):
    images = np.random.RandomState(0).randint(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    path = npz(tmp_path, x=images, y=Y)
    refused(path, "8x8", "4x6", "resize=True", input_shape=(3, 4, 6))
    pytest.importorskip("PIL")
    got = data.load(path, input_shape=(3, 4, 6), resize=True)
    assert got.x.shape == (6, 3, 4, 6) and abs(got.x.mean() - images.mean() / 255) < 0.02
    flat = data.load(
        npz(tmp_path, x=np.full((6, 8, 8, 3), (10, 20, 30), np.uint8), y=Y), (3, 2, 2), resize=True
    )
    assert np.allclose(flat.x * 255, np.reshape([10, 20, 30], (3, 1, 1)))


def test_a_broken_archive_always_gives_a_typed_error(tmp_path):
    """Flip, cut and overwrite bytes of a good file: load() returns or raises an AcclimateError."""
    good = npz(tmp_path, x=X, y=Y).read_bytes()
    np.savez_compressed(tmp_path / "packed.npz", x=X, y=Y)
    packed = (tmp_path / "packed.npz").read_bytes()
    dice, path, seen = random.Random(0), tmp_path / "broken.npz", 0
    for trial in range(600):
        raw = bytearray(packed if trial % 2 else good)
        match trial % 3:
            case 0:
                raw = raw[: dice.randrange(len(raw))]
            case 1:
                for _ in range(dice.randrange(1, 8)):
                    raw[dice.randrange(len(raw))] ^= 1 << dice.randrange(8)
            case 2:
                start = dice.randrange(len(raw))
                raw[start : start + dice.randrange(1, 64)] = dice.randbytes(dice.randrange(64))
        path.write_bytes(bytes(raw))
        try:
            data.load(path)
        except AcclimateError as error:
            seen += 1
            assert str(path) in str(error)
    assert seen > 200


def test_a_header_that_claims_too_much(tmp_path):
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        member, {"descr": "<f4", "fortran_order": False, "shape": (1 << 50, 4)}
    )
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr("x.npy", member.getvalue() + b"1234")
        archive.writestr("y.npy", member.getvalue())
    refused(tmp_path / "huge.npz", "cannot be read", "x")


def test_an_archive_that_unpacks_to_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_MAX_ARCHIVE_BYTES", 100)
    refused(npz(tmp_path, x=X, y=Y), "too much", "bytes")


# --- CSV ------------------------------------------------------------------------------------------


def table(tmp_path, text, suffix=".csv"):
    path = tmp_path / f"table{suffix}"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_csv(tmp_path):
    got = data.load(table(tmp_path, "a,label,b\n1,2,3\n4,0,6.5\n\n7,1,9\n"))
    assert got.x.tolist() == [[1, 3], [4, 6.5], [7, 9]] and got.x.dtype == np.float32
    assert got.y.tolist() == [2, 0, 1] and got.class_names == ()
    last = data.load(table(tmp_path, "a,b,kind\r\n1,2,x\r\n3,4,y\r\n"))
    assert last.y.tolist() == [0, 1] and last.class_names == ("x", "y")
    named = data.load(table(tmp_path, "\ufeffgas;b\n1;2\n0;4\n"), label="gas")
    assert named.y.tolist() == [1, 0] and named.x.tolist() == [[2], [4]]
    bare = data.load(table(tmp_path, "1\t2\tcat\n3\t4\tdog\n", ".tsv"))
    assert bare.x.tolist() == [[1, 2], [3, 4]] and bare.class_names == ("cat", "dog")
    pandas_like = data.load(table(tmp_path, "0,1,label\n5,6,1\n7,8,0\n"))
    assert pandas_like.x.tolist() == [[5, 6], [7, 8]] and pandas_like.y.tolist() == [1, 0]


def test_csv_is_brought_to_the_models_shape(tmp_path):
    text = ",".join(f"p{i}" for i in range(12)) + ",label\n" + ",".join(map(str, range(12))) + ",1\n"
    assert data.load(table(tmp_path, text), input_shape=(3, 2, 2)).x.shape == (1, 3, 2, 2)
    refused(table(tmp_path, text), "(12,)", "(3, 4, 4)", input_shape=(3, 4, 4))


def test_what_is_wrong_with_a_csv(tmp_path):
    refused(table(tmp_path, ""), "empty")
    refused(table(tmp_path, "a,b,label\n"), "no samples")
    refused(table(tmp_path, "label\n1\n2\n"), "no feature column")
    refused(table(tmp_path, "a,b,label\n1,2,0\n1,0\n"), "line 3", "2 cells, 3 columns")
    refused(table(tmp_path, "a,b,label\n1,2,0\n1,red,0\n"), "line 3, b", "'red'", "not a number")
    refused(table(tmp_path, "a,b,label\n1,,0\n"), "line 2, b", "missing")
    refused(table(tmp_path, "a,b,label\n1,2,\n"), "label is missing", "line 2")
    refused(table(tmp_path, "a,b,label\n1,nan,0\n"), "NaN", "row 0")
    refused(table(tmp_path, "a,b,label\n1,1e60,0\n"), "infinite")
    refused(table(tmp_path, "a,b,label\n1,2,0.5\n"), "not whole numbers")
    refused(table(tmp_path, "a,b\n1,2\n"), "no column 'c'", "a, b", label="c")
    refused(table(tmp_path, b"\xff\xfe\x00a,b\n1,2"), "UTF-8")
    refused(table(tmp_path, "a,b,label\n1,2,0\n"), "uint8 images only", error=WrongUse, mean=1.0)


# --- a folder of images ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for name, level in (("cat", 10), ("dog", 200)):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(np.full((6, 4, 3), level + i, np.uint8)).save(
                tmp_path / "pets" / name / f"{i}.png"
            )
    (tmp_path / "pets" / ".cache").mkdir()
    (tmp_path / "pets" / "cat" / "notes.txt").write_text("not an image")
    return tmp_path / "pets"


def test_folder(folder):
    got = data.load(folder)
    assert got.x.shape == (10, 3, 6, 4) and got.class_names == ("cat", "dog")
    assert np.array_equal(got.y, (got.x[:, 0, 0, 0] > 0.5).astype(np.int64))
    assert (
        0 < np.abs(np.diff(got.y)).sum() and got.y.tolist() == data.load(folder).y.tolist()
    )  # shuffled, replayable
    assert got.x[:, 0, 0, 0].tolist() != data.load(folder, seed=1).x[:, 0, 0, 0].tolist()
    assert data.load(folder, input_shape=(1, 6, 4)).x.shape == (10, 1, 6, 4)
    assert data.load(folder, input_shape=(3, 12, 8), resize=True).x.shape == (10, 3, 12, 8)
    swapped = data.load(folder, class_names=("dog", "cat"))
    assert np.array_equal(swapped.y, 1 - got.y)


def test_what_is_wrong_with_a_folder(folder, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    refused(folder, "6x4", "32x32", "resize=True", input_shape=(3, 32, 32))
    refused(folder, "not among", "dog", class_names=("cat",))
    refused(folder, "input shape", error=WrongUse, resize=True)
    (folder / "fish").mkdir()
    refused(folder, "no images", "fish")
    (folder / "fish" / "torn.png").write_bytes((folder / "cat" / "0.png").read_bytes()[:40])
    (folder / "fish" / "text.jpg").write_text("no")
    refused(folder, "cannot be read", "2 of 12", "torn.png", "text.jpg")
    (folder / "fish" / "torn.png").unlink()
    Image.fromarray(np.zeros((6, 4), np.uint16)).save(folder / "fish" / "text.jpg", "PNG")
    refused(folder, "not 8 bit")
    Image.fromarray(np.zeros((9, 4, 3), np.uint8)).save(folder / "fish" / "text.jpg")
    refused(folder, "differ in size", "9x4", "6x4")
    assert data.load(folder, input_shape=(3, 6, 4), resize=True).x.shape == (11, 3, 6, 4)
    (tmp_path / "bare").mkdir()
    refused(tmp_path / "bare", "no class folders")


def test_data_dir(tmp_path, monkeypatch):
    monkeypatch.delenv("ACCLIMATE_DATA", raising=False)
    assert data.data_dir() is None
    monkeypatch.setenv("ACCLIMATE_DATA", str(tmp_path))
    assert data.data_dir() == tmp_path
    monkeypatch.setenv("ACCLIMATE_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(BadInput, match="nowhere"):
        data.data_dir()


# --- parting --------------------------------------------------------------------------------------


def test_split_keeps_classes_and_order():
    y = np.r_[np.zeros(80), np.ones(19), [2]].astype(np.int64)
    whole = data.Dataset(np.arange(100, dtype=np.float32)[:, None], y)
    parted = data.split(whole, 0.2, seed=3)
    assert np.bincount(parted.y_val).tolist() == [16, 4] and np.bincount(parted.y).tolist() == [64, 15, 1]
    rows = np.r_[parted.x[:, 0], parted.x_val[:, 0]]
    assert sorted(rows.tolist()) == list(range(100)) and (np.diff(parted.x[:, 0]) > 0).all()
    assert np.array_equal(y[parted.x_val[:, 0].astype(int)], parted.y_val)
    assert np.array_equal(data.split(whole, 0.2, seed=3).x_val, parted.x_val)
    assert not np.array_equal(data.split(whole, 0.2, seed=4).x_val, parted.x_val)
    assert data.split(parted, 0.5) is parted
    targets = data.split(data.Dataset(whole.x, np.eye(3, dtype=np.float32)[y]), 0.1)
    assert len(targets.x_val) == 10 and targets.y_val.shape == (10, 3)


def test_a_split_that_cannot_be():
    one = data.Dataset(np.ones((1, 2), np.float32), np.array([0]))
    with pytest.raises(BadInput, match="1 samples"):
        data.split(one)
    for fraction in (0, 1, -0.5, float("nan")):
        with pytest.raises(WrongUse):
            data.split(one, fraction)
    for seed in (-1, 0.5, True, "1"):
        with pytest.raises(WrongUse, match="seed"):
            data.split(one, 0.5, seed)


@pytest.mark.parametrize("alpha", [1e-6, 0.1, 1.0, 1000.0])
@pytest.mark.parametrize("clients", [1, 7, 40])
def test_partition(alpha, clients):
    y = np.random.RandomState(1).randint(0, 5, 40)
    parts = data.partition_dirichlet(y, clients, alpha, seed=2)
    assert len(parts) == clients and all(len(part) for part in parts)
    assert sorted(np.concatenate(parts).tolist()) == list(range(40))
    again = data.partition_dirichlet(y, clients, alpha, seed=2)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_alpha_sets_how_uneven_a_partition_is(digits):
    def unevenness(alpha):
        parts = data.partition_dirichlet(digits.y, 10, alpha)
        shares = np.array([np.bincount(digits.y[part], minlength=10) / len(part) for part in parts])
        return shares.max(1).mean()

    levels = [unevenness(alpha) for alpha in (0.05, 0.5, 5.0, 500.0)]
    assert levels == sorted(levels, reverse=True) and levels[0] > 0.6 and levels[-1] < 0.2


@pytest.mark.parametrize(("clients", "alpha"), [(0, 1.0), (7, 1.0), (2, 0.0), (2, -1.0), (2, float("nan"))])
def test_a_partition_that_cannot_be(clients, alpha):
    with pytest.raises(WrongUse):
        data.partition_dirichlet(np.zeros(6, int), clients, alpha)


# --- drifts ---------------------------------------------------------------------------------------


def colour():
    return np.random.RandomState(0).random_sample((4, 3, 20, 14)).astype(np.float32)


@pytest.mark.parametrize("name", data.INPUT_DRIFTS)
def test_a_corruption_is_a_pure_function(name, digits):
    for x in (digits.x[:50], colour(), digits.x[:0]):
        before = x.copy()
        for severity in SEVERITIES:
            out = data.INPUT_DRIFTS[name](x, severity, 5)
            assert out.shape == x.shape and out.dtype == np.float32 and out.flags.c_contiguous
            assert np.isfinite(out).all() and out.min(initial=0) >= 0 and out.max(initial=0) <= 1
            assert np.array_equal(out, data.INPUT_DRIFTS[name](x, severity, 5))
            assert np.array_equal(x, before) and not np.shares_memory(out, x)
            first = data.INPUT_DRIFTS[name](x[:3], severity, 5)
            assert np.allclose(first, out[:3], atol=1e-6)  # a sample does not depend on those after it


@pytest.mark.parametrize("name", data.INPUT_DRIFTS)
def test_damage_grows_with_severity(name, digits):
    x = digits.x_val
    moved = [float(np.abs(data.INPUT_DRIFTS[name](x, severity, 0) - x).mean()) for severity in SEVERITIES]
    assert moved[0] > 0.005 and all(a < b for a, b in zip(moved, moved[1:], strict=False)), moved


@pytest.fixture(scope="module")
def classifier(digits):
    """Ridge regression on one-hot labels and random ReLU features: a small model that needs numpy alone."""
    rs = np.random.RandomState(0)
    hidden, shift = rs.standard_normal((64, 400)), rs.standard_normal(400)

    def features(x):
        return np.maximum((x.reshape(len(x), -1) - 0.3) @ hidden + shift, 0)

    f = features(digits.x)
    readout = np.linalg.solve(f.T @ f + 10 * np.eye(400), f.T @ np.eye(10)[digits.y])
    return lambda x: float(((features(x) @ readout).argmax(1) == digits.y_val).mean())


@pytest.mark.parametrize("name", data.INPUT_DRIFTS)
def test_a_trained_model_falls_clearly(name, digits, classifier):
    clean = classifier(digits.x_val)
    assert clean > 0.95
    scores = [classifier(data.drifted(digits, name, severity).x_val) for severity in SEVERITIES]
    assert scores[2] < clean - 0.05 and scores[4] < clean - 0.3, scores
    assert all(b < a + 0.03 for a, b in zip(scores, scores[1:], strict=False)), scores


@pytest.mark.parametrize(
    "name", ["gaussian_noise", "shot_noise", "impulse_noise", "slant", "rotate", "another_writer"]
)
def test_the_seed_matters_where_there_is_chance(name, digits):
    drift = data.INPUT_DRIFTS[name]
    assert not np.array_equal(drift(digits.x[:9], 3, 1), drift(digits.x[:9], 3, 2))


def test_noise_statistics():
    grey = np.full((50, 1, 16, 16), 0.5, np.float32)
    assert abs(data.gaussian_noise(grey, 1).std() - 0.1) < 0.003
    assert abs((data.impulse_noise(grey, 2) != 0.5).mean() - 0.1) < 0.01
    assert abs(data.shot_noise(grey, 1).std() - (0.5 / 12) ** 0.5) < 0.01
    assert not data.shot_noise(np.zeros_like(grey), 5).any()


def test_geometry():
    dot = np.zeros((1, 1, 9, 9), np.float32)
    dot[0, 0, 4, 4] = 1
    for name in ("slant", "rotate"):
        assert data.CORRUPTIONS[name](dot, 3, 0)[0, 0, 4, 4] == 1  # the centre stays
    bar = np.zeros((1, 1, 9, 9), np.float32)
    bar[0, 0, :, 4] = 1
    columns = data.slant(bar, 2)[0, 0].argmax(1)
    assert columns[0] > 4 > columns[-1]  # an upright stroke leans to the right
    turned = data.rotate(bar, 5)[0, 0]
    assert turned[:4, :4].sum() > turned[:4, 5:].sum()  # counter-clockwise: its top goes left
    assert data.stroke(dot, 5).sum() > data.stroke(dot, 2).sum() > 1
    wide = data.stroke(dot, 5)
    assert data.stroke_thin(wide, 3).sum() < wide.sum()
    flat = np.full((1, 2, 6, 5), 0.25, np.float32)
    for name in ("blur", "motion_blur", "pixelate", "contrast", "stroke", "stroke_thin"):
        assert np.allclose(data.CORRUPTIONS[name](flat, 4, 0), flat, atol=1e-6)
    mean = colour().mean((2, 3))
    assert np.allclose(data.pixelate(colour(), 5).mean((2, 3)), mean, atol=0.02)


@pytest.mark.parametrize("name", data.INPUT_DRIFTS)
def test_a_corruption_that_cannot_be(name):
    drift = data.INPUT_DRIFTS[name]
    x = np.zeros((2, 1, 4, 4), np.float32)
    for severity in (0, 6, 2.5, "3", None):
        with pytest.raises(WrongUse, match="severity"):
            drift(x, severity, 0)
    for bad in (x[0], x + 2, x - 1, x * np.nan):
        with pytest.raises(WrongUse):
            drift(bad, 3, 0)


def test_labels_drift():
    y = np.array([0, 1, 2, 3, 3])
    assert data.flip_labels(y, 4).tolist() == [3, 2, 1, 0, 0]
    assert np.array_equal(data.flip_labels(data.flip_labels(y, 4), 4), y)
    assert data.remap_labels(y, [1, 2, 3, 0]).tolist() == [1, 2, 3, 0, 0]
    assert data.remap_labels(y, {3: 0}).tolist() == [0, 1, 2, 0, 0]
    for classes in (4, 5, 17):
        table = data.remap_labels(np.arange(classes), classes, seed=1)
        assert sorted(table.tolist()) == list(range(classes)) and (table != np.arange(classes)).all()
    assert not np.array_equal(
        data.remap_labels(np.arange(17), 17, 1), data.remap_labels(np.arange(17), 17, 2)
    )
    for bad in (y - 1, y.astype(float), y[:, None]):
        with pytest.raises(WrongUse):
            data.remap_labels(bad, 4)
    with pytest.raises(WrongUse, match="3 classes"):
        data.flip_labels(y, 3)


def test_drifted_moves_both_parts(digits):
    noisy = data.drifted(digits, "gaussian_noise", 3)
    assert noisy.x.shape == digits.x.shape and np.array_equal(noisy.y, digits.y) and "gaussian" in noisy.name
    assert not np.array_equal(noisy.x_val, digits.x_val)
    noise = (noisy.x[:9] - digits.x[:9]), (noisy.x_val[:9] - digits.x_val[:9])
    assert not np.allclose(*noise)  # the parts do not share their noise
    flipped = data.drifted(digits, "flip")
    assert np.array_equal(flipped.y_val, 9 - digits.y_val) and flipped.x is digits.x
    unsplit = data.drifted(data.Dataset(digits.x, digits.y), "rotate")
    assert unsplit.x_val is None
    with pytest.raises(WrongUse, match="another_writer"):
        data.drifted(digits, "fog")


def test_a_real_file_loads():
    """Colour pictures from the folder of ACCLIMATE_DATA, where it is set."""
    root = data.data_dir()
    if root is None or not (root / "cifar10_testset.npz").is_file():
        pytest.skip("ACCLIMATE_DATA has no cifar10_testset.npz")
    got = data.load(root / "cifar10_testset.npz", input_shape=(3, 32, 32), mean=0.5, std=0.5)
    assert got.x.shape == (8000, 3, 32, 32) and got.x.min() == -1 and got.x.max() == 1
    assert got.classes == 10 and np.bincount(got.y).tolist() == [800] * 10
    moved = data.pixelate(got.x[:100] / 2 + 0.5, 3)
    assert moved.shape == (100, 3, 32, 32)
