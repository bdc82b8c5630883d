"Pictures, masks and boxes as they come: read rightly, or set aside with a reason; never a traceback"

import io, zlib
from pathlib import Path
import numpy as np, pandas as pd, pydicom, pytest
from PIL import Image, features
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, SecondaryCaptureImageStorage
import small
from medvlp.data import images
from medvlp.data import prepare as data_prepare
from medvlp.data.images import ImageError, Picture, pad, read_image, read_mask, read_picture, shrink
from medvlp.data.prepare import DataOptions, load_studies

SHARED = Path(__file__).parents[2] / "shared"
SAMPLES = Path(pydicom.__file__).parent / "data" / "test_files"
RAMP = np.linspace(0, 4095, 64 * 64).reshape(64, 64)


def shared(name):
    if not (SHARED / name).is_file():
        pytest.skip(f"{SHARED / name} is absent")
    return SHARED / name


def grey(path, **options):
    return np.asarray(read_image(path, **options)).astype(int)


def dicom(pixels, photometric="MONOCHROME2", syntax=ExplicitVRLittleEndian, **fields):
    "A DICOM data set of these integers"
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = SecondaryCaptureImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = pydicom.uid.generate_uid()
    ds.Rows, ds.Columns = pixels.shape[:2]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1 if pixels.ndim == 2 else 3, photometric
    ds.BitsAllocated = ds.BitsStored = 8 * pixels.itemsize
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(pixels.dtype.kind == "i")
    if pixels.ndim == 3:
        ds.PlanarConfiguration = 0
    for name, value in fields.items():
        setattr(ds, name, value)
    ds.add_new("PixelData", "OW" if pixels.itemsize > 1 else "OB", pixels.tobytes())
    return ds


def write(path, ds):
    ds.save_as(path, enforce_file_format=True)
    return path


# ---- grey levels of DICOM


@pytest.mark.parametrize("name", ["mono1_signed", "m1_win", "m1_lut"])
def test_monochrome1_falls_throughout(name):
    pixels = grey(shared(f"cases/{name}.dcm"))
    assert (np.diff(pixels.ravel()) <= 0).all() and pixels[0, 0] == 255 and pixels[-1, -1] == 0


def test_signed_monochrome1_is_the_reverse_of_monochrome2(tmp_path):
    ramp = np.linspace(-30_000, 30_000, 64 * 64).reshape(64, 64).astype(np.int16)
    one = grey(write(tmp_path / "one.dcm", dicom(ramp, "MONOCHROME1")))
    two = grey(write(tmp_path / "two.dcm", dicom(ramp)))
    assert (np.diff(one.ravel()) <= 0).all() and abs(one + two - 255).max() <= 1


def test_palette_gives_its_colours_as_grey():
    path = shared("cases/palette.dcm")
    ds = pydicom.dcmread(path)
    rgb = pydicom.pixels.apply_color_lut(ds.pixel_array, ds)
    luminance = (rgb >> 8 * (rgb.itemsize - 1)) @ [0.299, 0.587, 0.114]
    assert abs(grey(path) - luminance).max() <= 1 and abs(grey(path) - ds.pixel_array).max() > 50


def test_colours_become_grey(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(rgb).convert("L"))
    np.testing.assert_array_equal(grey(write(tmp_path / "rgb.dcm", dicom(rgb, "RGB"))), expected)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian], ids=["explicit", "implicit"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("dtype, value", [(np.int16, -2000), (np.uint16, 63536)], ids=["signed", "unsigned"])
def test_padding_is_black_and_outside_the_window(tmp_path, syntax, photometric, dtype, value):
    pixels = RAMP.astype(dtype)
    plain = grey(write(tmp_path / "plain.dcm", dicom(pixels[20:], photometric, syntax)))
    pixels[:20] = value
    path = write(tmp_path / "padded.dcm", dicom(pixels, photometric, syntax, PixelPaddingValue=value))
    padded = grey(path)
    assert padded[:20].max() == 0
    np.testing.assert_array_equal(padded[20:], plain)


def test_padding_may_be_a_range_and_not_everything(tmp_path):
    pixels = RAMP.astype(np.uint16)
    limits = dict(PixelPaddingValue=0, PixelPaddingRangeLimit=int(pixels[32, 0]))
    padded = grey(write(tmp_path / "a.dcm", dicom(pixels, **limits)))
    assert padded[:32].max() == 0 and padded[33].min() < 10 and padded[-1, -1] == 255
    write(tmp_path / "b.dcm", dicom(pixels, PixelPaddingValue=0, PixelPaddingRangeLimit=4095))
    with pytest.raises(ImageError, match="every pixel is padding"):
        read_image(tmp_path / "b.dcm")


# ---- what a file is


@pytest.mark.parametrize("name", ["a", "a.ima", "a.IMA", "a.dcm", "a.png", "1.2.840.10008.5"])
def test_dicom_is_recognised_by_content(tmp_path, name):
    assert read_image(write(tmp_path / name, dicom(RAMP.astype(np.uint16)))).size == (64, 64)


@pytest.mark.parametrize("sample", ["MR_small.dcm", "MR_small_implicit.dcm"])
def test_dicom_without_a_preamble(tmp_path, sample):
    whole, expected = (SAMPLES / sample).read_bytes(), grey(SAMPLES / sample)
    header = 132 + 12 + pydicom.dcmread(SAMPLES / sample).file_meta.FileMetaInformationGroupLength
    for start in (132, header):
        (tmp_path / "bare").write_bytes(whole[start:])
        np.testing.assert_array_equal(grey(tmp_path / "bare"), expected)


def test_a_picture_called_dcm(tmp_path):
    Image.fromarray(RAMP.astype(np.uint8)).save(tmp_path / "a.dcm", "PNG")
    assert read_image(tmp_path / "a.dcm").size == (64, 64)


def test_dicom_without_pixels():
    with pytest.raises(ImageError, match="holds no pixels"):
        read_image(SAMPLES / "rtplan.dcm")


def needs_decoder(path):
    syntax = pydicom.dcmread(path).file_meta.TransferSyntaxUID
    if not pydicom.pixels.get_decoder(syntax).is_available:
        pytest.skip(f"no decoder for {syntax.name}: pylibjpeg and its plug-ins are in lock.txt")
    return path


def test_jpeg_ls_without_loss():
    compressed = needs_decoder(SAMPLES / "MR_small_jpeg_ls_lossless.dcm")
    np.testing.assert_array_equal(grey(compressed), grey(SAMPLES / "MR_small.dcm"))


def test_lossless_jpeg():
    assert grey(needs_decoder(shared("datasets/dicom/JPEG-LL.dcm"))).shape == (1024, 256)
    expected = grey(SAMPLES / "SC_rgb_dcmtk_+eb+cr.dcm")
    assert abs(grey(needs_decoder(SAMPLES / "SC_rgb_jpeg_gdcm.dcm")) - expected).max() <= 2


def test_high_throughput_jpeg_2000_has_a_decoder():
    decoder = pydicom.pixels.get_decoder(pydicom.uid.HTJ2KLossless)
    if not decoder.is_available:
        pytest.skip("no decoder: pylibjpeg-openjpeg is in lock.txt")
    assert "pylibjpeg" in decoder.available_plugins


def test_a_missing_decoder_is_named(monkeypatch):
    path = SAMPLES / "MR_small_jpeg_ls_lossless.dcm"
    decoder = pydicom.pixels.get_decoder(pydicom.dcmread(path).file_meta.TransferSyntaxUID)
    monkeypatch.setattr(decoder, "_available", {})
    monkeypatch.setattr(decoder, "_unavailable", {"pylibjpeg": ("pylibjpeg>=2.0", "pylibjpeg-libjpeg>=2.1")})
    with pytest.raises(ImageError, match="^DICOM cannot be decoded: .*pylibjpeg-libjpeg") as e:
        read_image(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["JPEG-LL", "OBXXXX1A_rle", "RG3_J2KI", "SC_rgb", "vlut_04"])
def test_public_samples(name):
    pixels = grey(needs_decoder(shared(f"datasets/dicom/{name}.dcm")))
    assert pixels.max() > 200 and pixels.min() < 50


def test_several_frames_are_refused():
    with pytest.raises(ImageError, match="10 frames, a single one is needed"):
        read_image(shared("datasets/dicom/emri_small.dcm"))


# ---- size


def test_a_huge_picture_is_refused():
    with pytest.raises(ImageError, match="180000000 pixels.*Reduce the picture"):
        read_image(shared("cases/huge.png"))


def png_header(width, height):
    out = io.BytesIO()
    Image.new("L", (40, 40)).save(out, "PNG")
    data = bytearray(out.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("width, height", [(10_000, 9_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_a_header_that_promises_too_much(tmp_path, width, height):
    (tmp_path / "a.png").write_bytes(png_header(width, height))
    with pytest.raises(ImageError, match="(?i)reduce the picture|cannot be decoded"):
        read_image(tmp_path / "a.png")


def test_dicom_that_promises_too_much(tmp_path):
    write(tmp_path / "a.dcm", dicom(RAMP.astype(np.uint16), Rows=60_000, Columns=60_000))
    data = bytearray((SAMPLES / "JPEG2000.dcm").read_bytes())
    start = data.find(b"\xff\x4f\xff\x51")
    data[start + 8 : start + 16] = (30_000).to_bytes(4, "big") * 2
    (tmp_path / "b.dcm").write_bytes(data)
    for name in "ab":
        with pytest.raises(ImageError, match="at most 89 million"):
            read_image(tmp_path / f"{name}.dcm")


def test_a_huge_picture_is_one_row_of_the_quarantine(tmp_path):
    folder = small.write_studies(tmp_path / "data")
    (folder / "images" / "005.png").write_bytes(png_header(20_000, 20_000))
    prepared, quarantine = prepare(folder)
    assert len(prepared) == 47 and quarantine.file.tolist() == [str(folder / "images" / "005.png")]


@pytest.mark.parametrize("side, scale", [(511, 1), (512, 2), (1023, 2), (1024, 4), (2047, 4), (2048, 8)])
def test_a_draft_is_never_below_twice_the_stored_size(tmp_path, side, scale):
    Image.new("L", (side, side + 100), 9).save(tmp_path / "a.jpg")
    picture = read_picture(tmp_path / "a.jpg", 128)
    assert picture.size == (side, side + 100) and min(picture.image.size) == -(-side // scale) >= min(side, 256)
    assert read_image(tmp_path / "a.jpg").size == picture.size


# ---- every kind of damage


def samples():
    "Small files of several formats"
    rng = np.random.default_rng(0)
    image = Image.fromarray(np.kron(rng.integers(0, 255, (6, 6)), np.ones((8, 8))).astype(np.uint8))
    forms = [("PNG", {}), ("JPEG", {}), ("TIFF", dict(compression="tiff_lzw")), ("BMP", {}), ("DDS", {})]
    forms += [("JPEG", dict(progressive=True)), ("TIFF", {}), ("GIF", {})]
    forms += [("JPEG2000", {})] if features.check("jpg_2000") else []
    for name, options in forms:
        out = io.BytesIO()
        image.convert("RGB" if name == "DDS" else "L").save(out, name, **options)
        yield out.getvalue()
    out = io.BytesIO()
    dicom(np.asarray(image).astype(np.uint16), WindowCenter=100, WindowWidth=200).save_as(out, enforce_file_format=True)
    yield out.getvalue()
    yield from (
        (SAMPLES / name).read_bytes() for name in ("MR_small_RLE.dcm", "JPEG2000.dcm", "MR_small_jpeg_ls_lossless.dcm")
    )


def damage(data, seed):
    "Some bytes changed, mostly in the header, or the end cut off"
    rng, data = np.random.default_rng(seed), bytearray(data)
    end = len(data) if seed % 3 == 0 else min(len(data), 400)
    for at in rng.integers(0, end, rng.integers(1, 9)):
        data[at] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
    return bytes(data[: rng.integers(1, len(data))] if seed % 5 == 0 else data)


@pytest.mark.filterwarnings("ignore")
def test_damage_never_raises_anything_else(tmp_path):
    whole, read, refused = list(samples()), 0, 0
    picture = Picture(Image.new("L", (48, 48)), (48, 48), 1)
    for seed in range(260):
        path = tmp_path / f"{seed}{'.dcm' * (seed % 2)}"
        path.write_bytes(damage(whole[seed % len(whole)], seed))
        for reader in (lambda p: read_picture(p, 16), lambda p: read_mask(p, picture)):
            try:
                reader(path)
                read += 1
            except ImageError as e:
                assert str(e) and "\n" not in str(e)
                refused += 1
    assert read > 50 and refused > 50


@pytest.mark.parametrize(
    "data", [b"\0" * 500, b"DICM", b"\0" * 128 + b"DICM", b"\x08\0\0\0", b"\x89PNG\r\n\x1a\n", b"II*\0"]
)
def test_bare_signatures(tmp_path, data):
    for name in ("a", "a.dcm", "a.png"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ImageError):
            read_image(tmp_path / name)


@pytest.mark.parametrize("name", ["", "folder", "n" * 400, "nul\0"])
def test_paths_that_are_no_files(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ImageError):
        read_image(tmp_path / name)


# ---- which way up


def arrow():
    "A picture of 96 x 64 in which every corner differs"
    y, x = np.mgrid[:64, :96]
    return Image.fromarray(((x < 48) * 80 + (y < 32) * 160).astype(np.uint8))


def photograph(path, orientation, form):
    "The arrow as a camera would store it when held in one of eight ways"
    back = {**images._UPRIGHT, 6: images._UPRIGHT[8], 8: images._UPRIGHT[6]}
    stored = arrow().transpose(back[orientation]) if orientation > 1 else arrow()
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, form, exif=exif)
    return stored


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path, orientation, form):
    stored = photograph(tmp_path / "a", orientation, form)
    picture = read_picture(tmp_path / "a")
    assert picture.size == picture.image.size == (96, 64) and stored.size == ((96, 64) if orientation < 5 else (64, 96))
    assert abs(np.asarray(picture.image).astype(int) - np.asarray(arrow())).max() < 10


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_damaged_exif_block_does_not_cost_the_picture(tmp_path):
    arrow().save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\xff\x01\x12\0\x63")
    assert read_image(tmp_path / "a.jpg").size == (96, 64)


@pytest.mark.parametrize("mask_as", ["upright", "stored"])
def test_box_and_mask_of_a_photograph(tmp_path, mask_as):
    folder = small.write_studies(tmp_path / "data")
    stored = photograph(folder / "images" / "000.png", 6, "PNG")
    (arrow() if mask_as == "upright" else stored).point(lambda v: v > 200 and 7).save(folder / "mask.png")
    box = '[{"label": "corner", "box": [0, 0, 48, 32]}]'
    edit(folder, mask_file_name="mask.png", boxes=box)
    prepared, quarantine = prepare(folder)
    mask = np.asarray(prepared[0]["mask"])
    assert not len(quarantine) and prepared[0]["image"].size == prepared[0]["mask"].size == (60, 40)
    assert prepared[0]["boxes"][0]["box"] == [0, 0, 0.5, 0.5]
    assert (mask[:20, :30] == 7).all() and mask.sum() == 7 * 20 * 30


# ---- masks


def prepare(folder, **options):
    output = folder.parent / "prepared" / "levels"
    data_prepare.prepare(DataOptions(folder=str(folder), image_size=40, **options), output)
    return load_studies(output), pd.read_csv(output / "quarantine.csv")


def edit(folder, **cells):
    "Fill cells of the first row"
    table = pd.read_csv(folder / "metadata.csv", dtype=str, keep_default_na=False)
    for column, value in cells.items():
        table[column] = [value] + [""] * (len(table) - 1)
    table.to_csv(folder / "metadata.csv", index=False)


VALUES = np.repeat([0, 1, 2, 200], 12)[:, None] * np.ones((1, 56), int)
PALETTE = [0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255] + [0, 0, 0] * 252


def mask_image(kind):
    if kind == "palette":
        image = Image.fromarray(VALUES.astype(np.uint8))
        image.putpalette(PALETTE)
        return image
    if kind == "transparent":
        grey_levels = Image.fromarray(np.maximum(VALUES, 1).astype(np.uint8))
        return Image.merge("LA", [grey_levels, Image.fromarray(np.where(VALUES, 255, 0).astype(np.uint8))])
    dtype = {"8 bits": np.uint8, "16 bits": np.uint16, "32 bits": np.int32, "floats": np.float32}
    return Image.fromarray(VALUES.astype(dtype[kind]))


@pytest.mark.parametrize("kind", ["8 bits", "16 bits", "32 bits", "floats", "palette", "transparent"])
def test_values_of_a_mask_are_kept(tmp_path, kind):
    form = "TIFF" if kind in ("32 bits", "floats") else "PNG"
    mask_image(kind).save(tmp_path / "mask", form)
    mask = read_mask(tmp_path / "mask", Picture(None, (56, 48), 1))
    np.testing.assert_array_equal(np.asarray(mask), VALUES)
    assert (
        set(np.unique(shrink(mask, 40, nearest=True))) == set(np.unique(pad(mask, 40, nearest=True))) == {0, 1, 2, 200}
    )


def test_values_above_255_survive_preparation(tmp_path):
    folder = small.write_studies(tmp_path / "data")
    Image.fromarray((VALUES * 300).astype(np.uint16)).save(folder / "mask.png")
    edit(folder, mask_file_name="mask.png")
    prepared, quarantine = prepare(folder)
    assert not len(quarantine) and set(np.unique(prepared[0]["mask"])) == {0, 300, 600, 60_000}


def test_a_coloured_mask_has_no_colour_that_is_background(tmp_path):
    rgb = np.zeros((48, 56, 3), np.uint8)
    rgb[:24, :, 2] = 1
    Image.fromarray(rgb).save(tmp_path / "mask.png")
    mask = np.asarray(read_mask(tmp_path / "mask.png", Picture(None, (56, 48), 1)))
    assert (mask[:24] == 1).all() and (mask[24:] == 0).all()


def test_a_dicom_mask_is_not_windowed(tmp_path):
    write(tmp_path / "mask", dicom(VALUES.astype(np.uint16), WindowCenter=1, WindowWidth=1))
    np.testing.assert_array_equal(np.asarray(read_mask(tmp_path / "mask", Picture(None, (56, 48), 1))), VALUES)


def test_values_that_are_no_names(tmp_path):
    Image.fromarray((VALUES / 3).astype(np.float32)).save(tmp_path / "mask", "TIFF")
    with pytest.raises(ImageError, match="whole numbers from 0 to 65535; this one has 0.0 to 66.6"):
        read_mask(tmp_path / "mask", Picture(None, (56, 48), 1))


@pytest.mark.parametrize("size", [(56, 48), (112, 96), (28, 24), (55, 48)])
def test_a_mask_may_have_another_scale(tmp_path, size):
    Image.new("L", size).save(tmp_path / "mask.png")
    assert read_mask(tmp_path / "mask.png", Picture(None, (56, 48), 1)).size == size


@pytest.mark.parametrize("size", [(48, 56), (48, 48), (56, 40), (560, 500)])
def test_a_mask_of_other_proportions_is_set_aside(tmp_path, size):
    folder = small.write_studies(tmp_path / "data")
    Image.new("L", size).save(folder / "mask.png")
    edit(folder, mask_file_name="mask.png")
    prepared, quarantine = prepare(folder)
    row = quarantine.iloc[0]
    assert len(quarantine) == 1 and (row.field, row.excluded_from) == ("mask", "segmentation")
    assert "mask of {} x {} pixels beside a picture of 56 x 48".format(*size) in row.reason
    assert prepared[0]["mask"] is None and len(prepared) == 48


# ---- boxes


@pytest.mark.parametrize(
    "box, problem",
    [
        ([0.1, 0.2, 0.5, 0.6], "box [0.1, 0.2, 0.5, 0.6] looks like fractions"),
        ([1200, 900, 1500, 1300], "box [1200, 900, 1500, 1300] reaches beyond the picture of 56 x 48 pixels"),
        ([-5, -5, 500, 600], "box [-5, -5, 500, 600] reaches beyond the picture of 56 x 48 pixels"),
    ],
)
def test_wrong_boxes_name_field_value_and_remedy(tmp_path, box, problem):
    folder = small.write_studies(tmp_path / "data")
    edit(folder, boxes=f'[{{"label": "a", "box": [1, 2, 30, 40]}}, {{"label": "b", "box": {box}}}]')
    prepared, quarantine = prepare(folder)
    row = quarantine.iloc[0]
    assert len(quarantine) == 1 and (row.field, row.excluded_from, row.study_id) == ("boxes", "pointing", "s0")
    assert problem in row.reason and "Give x0, y0, x1, y1 in pixels of the image file" in row.reason
    assert prepared[0]["boxes"] == [] and len(prepared) == 48


def test_boxes_refer_to_the_file_though_a_draft_is_decoded(tmp_path):
    folder = small.write_studies(tmp_path / "data")
    Image.new("L", (800, 400)).save(folder / "images" / "000.png", "JPEG")
    edit(folder, boxes='[{"label": "a", "box": [200, 100, 400, 400]}]')
    prepared, quarantine = prepare(folder)
    assert not len(quarantine) and prepared[0]["boxes"][0]["box"] == [0.25, 0.25, 0.5, 1]


# ---- crop or pad


def test_padding_to_a_square(tmp_path):
    folder = small.write_studies(tmp_path / "data")
    Image.new("L", (80, 40), 200).save(folder / "images" / "000.png")
    Image.new("L", (160, 80), 3).save(folder / "mask.png")
    edit(folder, mask_file_name="mask.png", boxes='[{"label": "a", "box": [0, 0, 80, 40]}]')
    prepared, quarantine = prepare(folder, square="pad")
    image, mask = (np.asarray(prepared[0][name]) for name in ("image", "mask"))
    assert not len(quarantine) and image.shape == mask.shape == (40, 40)
    for pixels, value in ((image, 200), (mask, 3)):
        assert (pixels[10:30] == value).all() and not pixels[:10].any() and not pixels[30:].any()
    assert prepared[0]["boxes"][0]["box"] == [0, 0.25, 1, 0.75]
    assert {row["image"].size for row in prepared} == {(40, 40)}


def test_an_extreme_strip_is_padded():
    assert pad(Image.new("L", (32, 20_000)), 64).size == (64, 64)


def test_the_demo_comes_out_as_before():
    "Pictures and masks of the phantom set, decoded and shrunk without any of the above, give the same bytes"
    demo = Path(__file__).parents[1] / "assets" / "demo"
    options = DataOptions(folder=str(demo), image_size=108)
    for path in sorted((demo / "images").iterdir())[:50]:
        plain = shrink(Image.open(path).convert("L"), 108)
        assert data_prepare._stored(read_picture(path, 108).image, options) == data_prepare.png(plain)
        mask = demo / "masks" / f"{path.stem}.png"
        kept = read_mask(mask, read_picture(path))
        plain = shrink(Image.open(mask).convert("L"), 108, nearest=True)
        assert data_prepare._stored(kept, options, nearest=True) == data_prepare.png(plain)


def test_what_a_draft_changes_in_real_pictures():
    shared("datasets/slake/train.json")
    found = sorted((SHARED / "datasets/slake/imgs").glob("*/source.jpg"))
    large = [path for path in found if min(Image.open(path).size) >= 512][:40]
    pairs = [[np.asarray(shrink(read_picture(p, size).image, 128)).astype(int) for size in (None, 128)] for p in large]
    change = [abs(whole - draft) for whole, draft in pairs]
    assert len(large) == 40 and np.mean([c.mean() for c in change]) < 0.5 and max(c.max() for c in change) <= 15
