"""The paper's and clean-fid's protocols give the scores of the tools they are made of, on weights of random numbers.

The published weights are not available offline; files of the same names, keys and shapes replace them.
"""

import numpy as np
import pytest
import torch
import torchvision
from helpers import fill_folder
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from bksdm_utils.data.downloads import DOWNLOADS
from bksdm_utils.data.rendering import render
from bksdm_utils.data.scenes import sample_scene
from bksdm_utils.evaluation.evaluator import Evaluator, ScoredImages
from bksdm_utils.evaluation.metrics import fid
from bksdm_utils.evaluation.networks import MetricClip, find_weights
from bksdm_utils.files import ROOT

COUNT = 24


@pytest.fixture(scope="module")
def images():
    scenes = [sample_scene(i, "test") for i in range(COUNT)]
    return {f"COCO_{i}": (s.caption, render(s, i, 128).resize((512, 512))) for i, s in enumerate(scenes)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """data/weights and a CLIP, as they would be downloaded, with random numbers in them."""
    root = tmp_path_factory.mktemp("root")
    torch.manual_seed(0)
    inception = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    for module in inception.modules():  # untrained, it maps all images to the same: its normalisations need statistics
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    seen = [np.asarray(render(sample_scene(i), i, 299)) for i in range(12)]
    with torch.no_grad():
        inception(torch.from_numpy(np.stack(seen)).permute(0, 3, 1, 2) / 127.5 - 1)
    for name in ("inception_pytorch_fid", "inception_torch_fidelity"):
        path = root / DOWNLOADS[name].path
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(inception.state_dict(), path)

    class Script(torch.nn.Module):
        def __init__(self):
            super().__init__()
            convolution = torch.nn.Conv2d(3, 2048, 32, stride=89)
            self.layers = torch.nn.Sequential(convolution, torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1))

        def forward(self, x, return_features: bool = False):
            return self.layers(x)

    torch.jit.script(Script()).save(root / DOWNLOADS["inception_clean_fid"].path)
    storybook_clip = ROOT / "data" / "storybook" / "clip"
    config = CLIPConfig.from_pretrained(storybook_clip)
    config.vision_config.image_size, config.vision_config.patch_size = 224, 32
    CLIPModel(config).save_pretrained(root / "clip")
    clip_model = MetricClip(storybook_clip)
    clip_model.tokenizer.save_pretrained(root / "clip")
    clip_model.processor.size, clip_model.processor.crop_size = {"shortest_edge": 224}, {"height": 224, "width": 224}
    clip_model.processor.save_pretrained(root / "clip")
    return root


@pytest.fixture
def downloaded(weights, monkeypatch):
    monkeypatch.setattr("bksdm_utils.evaluation.networks.ROOT", weights)
    return weights


def as_files(folder, images):
    """The paper's files, by separate steps: JPEG, then bicubic to 256 and JPEG again."""
    (folder / "im512").mkdir(parents=True)
    (folder / "im256").mkdir()
    for id, (_, image) in images.items():
        image.save(folder / "im512" / f"{id}.jpg")
        Image.open(folder / "im512" / f"{id}.jpg").resize((256, 256)).save(folder / "im256" / f"{id}.jpg")
    return folder / "im256"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_the_papers_scores_equal_those_of_its_tools(downloaded, images, tmp_path, monkeypatch):
    import pytorch_fid.inception
    import torch_fidelity
    from pytorch_fid.fid_score import get_activations
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    folder = as_files(tmp_path / "theirs", images)
    paths = sorted(map(str, folder.iterdir()))
    state = torch.load(downloaded / DOWNLOADS["inception_pytorch_fid"].path)
    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: state)
    theirs = get_activations(paths, pytorch_fid.inception.InceptionV3([3]), 8, 2048, "cpu", 0)
    real = np.random.default_rng(0).normal(theirs.mean(0), theirs.std(0), (3000, 2048))
    np.savez(tmp_path / "real_im256.npz", mu=real.mean(0), sigma=np.cov(real, rowvar=False))  # as it is published

    clip = str(downloaded / "clip")
    evaluator = Evaluator("paper", real=tmp_path / "real_im256.npz", clip=clip, cache_dir=tmp_path / "cache")
    for image_format in ("jpeg", "png"):  # stored as the paper stores them, or without loss
        own = tmp_path / image_format
        prompts = fill_folder(own, images, image_format)
        ours = evaluator.evaluate(own, prompts)
        rows = ScoredImages(evaluator, own, prompts).rows(evaluator.features)
        assert np.abs(rows - theirs).max() < 1e-4 * np.abs(theirs).max()
        assert theirs.std(0).mean() > 0.01 * theirs.mean()  # different images, different features
    moments = [{"mu": x.mean(0), "sigma": np.cov(x, rowvar=False)} for x in (theirs.astype(float), real)]
    expected = fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"]
    assert ours.scores["fid"].value == pytest.approx(expected, abs=1e-3)
    expected_is = torch_fidelity.calculate_metrics(
        input1=str(folder), isc=True, isc_splits=10, cuda=False, verbose=False, save_cpu_ram=True,
        feature_extractor_weights_path=str(downloaded / DOWNLOADS["inception_torch_fidelity"].path),
    )  # fmt: skip
    assert ours.scores["inception_score"].value == pytest.approx(expected_is["inception_score_mean"], abs=1e-4)
    assert ours.scores["inception_score"].value > 1.001 and "kid" not in ours.scores
    cosine = [plain_cosine(clip, path, images[path.split("/")[-1][:-4]][0]) for path in paths]
    assert ours.scores["clip_score"].value == pytest.approx(np.mean(cosine), abs=1e-4)
    assert np.std(cosine) > 1e-3


@torch.no_grad()
def plain_cosine(clip, path, caption):
    """One image at a time, with CLIP's published mean and deviation, as open_clip's own transform has it."""
    model, clip_model = CLIPModel.from_pretrained(clip), MetricClip(clip)
    image = Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC)
    mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = torch.from_numpy((np.asarray(image) / 255 - mean) / deviation).float().permute(2, 0, 1)[None]
    ids = clip_model.tokenizer([caption], padding="max_length", truncation=True, return_tensors="pt").input_ids
    out = model(input_ids=ids, pixel_values=pixels)
    return torch.cosine_similarity(out.image_embeds, out.text_embeds).item()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_the_clean_protocol_equals_clean_fid(downloaded, images, tmp_path):
    from cleanfid.features import InceptionV3W
    from cleanfid.fid import frechet_distance, get_folder_features

    prompts = fill_folder(tmp_path / "ours", images)
    (tmp_path / "real").mkdir()
    for i in range(COUNT):
        render(sample_scene(i), i, 96).save(tmp_path / "real" / f"{i}.png")
    clip = str(downloaded / "clip")
    ours = Evaluator("clean", tmp_path / "real", cache_dir=tmp_path / "cache", clip=clip)
    evaluation = ours.evaluate(tmp_path / "ours", prompts)
    network = InceptionV3W(str(find_weights("inception_clean_fid").parent), download=False)
    features = [get_folder_features(str(tmp_path / name), network, num_workers=0, device="cpu", verbose=False)
                for name in ("ours/images", "real")]  # fmt: skip
    moments = [m for x in features for m in (x.mean(0), np.cov(x, rowvar=False))]
    assert evaluation.scores["fid"].value == pytest.approx(frechet_distance(*moments), abs=1e-3)
    assert evaluation.scores["fid"].value > 1e-3 and "kid" in evaluation.scores


def test_weights_may_be_in_the_hubs_cache(downloaded, monkeypatch, tmp_path):
    monkeypatch.setattr("bksdm_utils.evaluation.networks.ROOT", tmp_path)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch" / "hub"))
    name = "inception_pytorch_fid"
    with pytest.raises(ValueError, match="looked in .* and .*With a network"):
        find_weights(name)
    path = tmp_path / "torch" / "hub" / "checkpoints" / (downloaded / DOWNLOADS[name].path).name
    path.parent.mkdir(parents=True)
    path.touch()
    assert find_weights(name) == path


@pytest.mark.parametrize("count", [400, 40])  # more and fewer images than dimensions
def test_fid_equals_the_libraries(count):
    from cleanfid.fid import frechet_distance
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(64, 64))
    x, y = rng.normal(size=(count, 64)) @ mixing, 0.3 + rng.normal(size=(500, 64)) @ mixing * 1.1
    moments = [(z.mean(0), np.cov(z, rowvar=False)) for z in (x, y)]
    expected_is = fid_statistics_to_metric(*({"mu": m, "sigma": c} for m, c in moments), verbose=False)
    assert fid(x, y) == pytest.approx(expected_is["frechet_inception_distance"], abs=1e-3)
    assert fid(x, y) == pytest.approx(frechet_distance(*moments[0], *moments[1]), abs=1e-3)
    assert fid(x, x) == pytest.approx(0, abs=1e-4) and fid(x, y) > 1
