"""Chapter 17 against diffusers' PriorTransformer and UnCLIPScheduler, and against Karlo's own layout of the weights."""

import json

import pytest
import torch

from diffusionbook.denoising import Condition
from diffusionbook.prior import DiffusionPrior, PriorConfig, from_karlo, sample_embedding
from diffusionbook.schedules import NoiseSchedule

diffusers = pytest.importorskip("diffusers")

TINY = {
    "two blocks": PriorConfig(embedding=12, words=5, width=32, layers=2, heads=4),
    "one head": PriorConfig(embedding=8, words=3, width=16, layers=3, heads=1),
}
MASK = torch.tensor([[True] * 5, [True, True, False, False, False]])


def randomise(model):
    """Fresh weights are zero in the places that matter; a comparison of them could not fail."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        model.clip_std.abs_()
    return model.eval()


def told(config, count=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    return Condition(torch.randn(count, config.words, config.embedding, generator=g),
                     torch.randn(count, config.embedding, generator=g), mask=MASK[:count, :config.words])


@torch.no_grad()
def assert_same(ours, theirs):
    condition = told(ours.config)
    x, t = torch.randn(2, ours.config.embedding, generator=torch.Generator().manual_seed(2)), torch.tensor([3, 950])
    expected = theirs(x, t, condition.embedding, condition.context, condition.mask).predicted_image_embedding
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(x, t, **condition.parts()), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.restore(x), theirs.post_process_latents(x))


@pytest.mark.parametrize("name", TINY)
def test_ours_is_opened_by_diffusers(name, tmp_path):
    ours = randomise(DiffusionPrior(TINY[name]))
    ours.save_pretrained(tmp_path)
    theirs, report = diffusers.PriorTransformer.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert_same(ours, theirs.eval())


@pytest.mark.parametrize("name", TINY)
def test_theirs_is_opened_by_us(name, tmp_path):
    theirs = randomise(diffusers.PriorTransformer.from_config(TINY[name].to_config()))
    theirs.save_pretrained(tmp_path)
    assert_same(DiffusionPrior.from_pretrained(tmp_path), theirs)


def test_karlo_has_the_public_names_shapes_and_size():
    with torch.device("meta"):
        ours, theirs = DiffusionPrior(PriorConfig.preset("karlo")), diffusers.PriorTransformer()
    found, wanted = ({key: tensor.shape for key, tensor in model.state_dict().items()} for model in (ours, theirs))
    assert found == wanted and len(found) == 338
    assert ours.count_parameters() == 1_022_030_080
    public = json.loads(theirs.to_json_string())
    assert PriorConfig.from_config(public) == PriorConfig.preset("karlo")
    assert PriorConfig.preset("karlo").to_config().items() <= public.items()


def to_karlo(state, heads):
    """Karlo's own names, written out here so that our rules are tested against something else."""
    names = {"proj_in": "clip_img_proj", "embedding_proj": "text_emb_proj", "norm_out": "final_ln",
             "encoder_hidden_states_proj": "text_enc_proj", "proj_to_clip_embeddings": "out_proj",
             "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    inner = {"norm1": "ln_1", "norm3": "ln_2", "attn1.to_out.0": "attn.c_proj", "ff.net.0.proj": "mlp.c_fc",
             "ff.net.2": "mlp.c_proj"}
    karlo = {"model.prd_emb": state["prd_embedding"], "model.positional_embedding": state["positional_embedding"]}
    for end in ("weight", "bias"):
        karlo |= {f"model.{theirs}.{end}": state[f"{ours}.{end}"] for ours, theirs in names.items()}
        for i in range(sum(key.endswith("norm1.weight") for key in state)):
            here, there = f"transformer_blocks.{i}.", f"model.transformer.resblocks.{i}."
            karlo |= {f"{there}{theirs}.{end}": state[f"{here}{ours}.{end}"] for ours, theirs in inner.items()}
            q, k, v = (state[f"{here}attn1.to_{part}.{end}"].chunk(heads) for part in "qkv")
            karlo[f"{there}attn.c_qkv.{end}"] = torch.cat([row for head in zip(q, k, v, strict=True) for row in head])
    return karlo


def test_karlos_own_files_are_opened_by_us():
    config = TINY["two blocks"]
    theirs = randomise(diffusers.PriorTransformer.from_config(config.to_config()))
    karlo = to_karlo(theirs.state_dict(), config.heads)
    statistics = {"clip_mean": theirs.clip_mean.detach(), "clip_std": theirs.clip_std.detach()}
    assert_same(DiffusionPrior(config).load(karlo | statistics).eval(), theirs)
    with pytest.raises(ValueError, match="clip_mean"):
        DiffusionPrior(config).load(karlo)


def test_karlos_names_for_the_public_size():
    """None of the 338 tensors is left over or missing, and all shapes fit, without the weights themselves."""
    config = PriorConfig.preset("karlo")
    with torch.device("meta"):
        prior = DiffusionPrior(config)
    state = prior.state_dict()
    karlo = to_karlo(state, config.heads)
    assert len(karlo) == 338 - 2 - 2 * 2 * 20  # statistics apart; three tensors stacked in one, twice in each block
    ours = from_karlo(karlo, heads=config.heads)
    assert {key: tensor.shape for key, tensor in ours.items()} == {
        key: tensor.shape for key, tensor in state.items() if not key.startswith("clip_")}


def public_scheduler(**options):
    """diffusers' scheduler with its tables in float64: in float32, 1 - alpha_bar at t = 0 is off by a thousandth."""
    scheduler = diffusers.UnCLIPScheduler(**options)
    exact = NoiseSchedule.cosine()
    torch.testing.assert_close(scheduler.betas, exact.betas.float())
    scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod = exact.betas, exact.alphas, exact.alpha_bar
    return scheduler


def test_drawing_is_the_public_loop():
    """Twenty-five steps, guidance, clipping and noise as in diffusers' UnCLIPPipeline, written out plainly."""
    config = TINY["two blocks"]
    ours = randomise(DiffusionPrior(config))
    theirs = diffusers.PriorTransformer.from_config(config.to_config()).eval()
    theirs.load_state_dict(ours.state_dict())
    scheduler = public_scheduler(clip_sample_range=5.0, prediction_type="sample")
    scheduler.set_timesteps(25)
    asked, empty = told(config), told(config, seed=7)
    both = empty.stack(asked)
    generators = [torch.Generator().manual_seed(3 + i) for i in range(2)]
    x = torch.cat([torch.randn(1, config.embedding, generator=g) for g in generators])
    times = scheduler.timesteps.tolist()
    for t, then in zip(times, [*times[1:], None], strict=True):
        with torch.no_grad():
            without, asked_for = theirs(torch.cat([x, x]), t, both.embedding, both.context,
                                        both.mask).predicted_image_embedding.chunk(2)
        x = scheduler.step(without + 4 * (asked_for - without), t, x, prev_timestep=then,
                           generator=generators).prev_sample.float()
    expected = theirs.post_process_latents(x)
    found = sample_embedding(ours, asked, empty, schedule=NoiseSchedule.cosine(), candidates=1, seed=3)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
