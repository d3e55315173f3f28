"""Every network of the matrix: the nasty ones, then torchvision, timm and transformers.

They are built at the smallest sensible size with random weights.

`CASES` maps a name to its `Case`; the tags of a case are `quick` or `slow`, then its family.
"""

import functools
import importlib.util

import torch
from nasty import CASES as CASES
from nasty import Case, add, seeded
from torch import nn


@torch.no_grad()
def randomise(model: nn.Module, seed=0) -> nn.Module:
    """Draw statistics and scales of norms, and all that is constant, such as zero biases.

    Nothing is then the identity by chance.
    """
    g = torch.Generator().manual_seed(seed)
    for name, b in model.named_buffers():
        if name.endswith("running_mean"):
            b.copy_(0.2 * torch.randn(b.shape, generator=g))
        if name.endswith("running_var"):
            b.copy_(0.5 + torch.rand(b.shape, generator=g))
    for p in model.parameters():
        if p.numel() and p.is_floating_point() and (p == p.flatten()[0]).all():
            p.add_(0.2 * torch.randn(p.shape, generator=g).to(p))
    return model


LEFT = dict(  # share of the parameters that may be left of a family's networks
    small=0.5,
    prune_nb=0.5,
    torchvision=0.5,
    segmentation=0.5,
    video=0.5,
    detection=0.6,
    transformers=0.8,
    timm=0.6,
)
# The width of a head is computed from that of the stream, which therefore is kept.
HEADS_BY_WIDTH = """
coat_lite_tiny crossvit_tiny_240 pvt_v2_b0 eva02_tiny_patch14_224 nest_tiny volo_d1_224 davit_tiny
gcvit_xxtiny swinv2_cr_tiny_224
"""
MORE = dict.fromkeys(HEADS_BY_WIDTH.split(), 0.75)
MORE |= {"googlenet": 0.7, "inception_v3": 0.55}  # classifiers that run in training only are kept
# Filters are standardised over their inputs, which are kept; attention convolves over channels.
MORE |= {"nf_regnet_b0": 0.8, "eca_nfnet_l0": 0.95}


def real(name, build, inputs, family, quick=False, seconds=300, **rest):
    """Register a network of a library; only how much must be removed is said, not where."""

    def make():
        return build().eval().requires_grad_(True)

    rest = dict(left=MORE.get(name, LEFT.get(family, 1))) | rest
    case = Case(f"{family}/{name}", seeded(make), seeded(inputs), kept=True, **rest)
    case.tags = ("quick" if quick else "slow", family)
    case.seconds = 60 if quick else seconds
    add(case)


def image(size, n=1):
    return lambda: torch.randn(n, 3, size, size)


def installed(package):
    return importlib.util.find_spec(package) is not None


# --- our own ---


def own():
    from prune_nb.models import create_model

    for name in ("lenet", "resnet20", "preresnet29", "densenet40", "vgg16"):
        real(
            name,
            functools.partial(create_model, name, num_classes=10, in_channels=3),
            image(32, 2),
            "prune_nb",
            quick=name != "densenet40",
        )


# --- torchvision ---

SIZES = dict(
    alexnet=64,
    googlenet=64,
    inception_v3=96,
    squeezenet=64,
    vgg=32,
    maxvit=224,
    convnext=64,
    swin=64,
)


def torchvision_networks():
    from torchvision import models
    from torchvision.models import get_model, list_models

    for name in list_models(module=models):
        size = next((s for k, s in SIZES.items() if name.startswith(k)), 64)
        arguments = (
            dict(image_size=56 if name.endswith("14") else 64)
            if name.startswith("vit")
            else dict(init_weights=False)
            if name in ("googlenet", "inception_v3")
            else {}
        )
        real(
            name,
            functools.partial(get_model, name, weights=None, **arguments),
            image(arguments.get("image_size", size)),
            "torchvision",
            seconds=600,
        )
    for name in list_models(module=models.segmentation):
        real(
            name,
            functools.partial(get_model, name, weights=None, weights_backbone=None, num_classes=5),
            image(64),
            "segmentation",
        )
        if "lraspp" not in name:
            real(
                name + "_auxiliary",
                functools.partial(
                    get_model,
                    name,
                    weights=None,
                    weights_backbone=None,
                    num_classes=5,
                    aux_loss=True,
                ),
                image(64),
                "segmentation",
            )
    for name in list_models(module=models.video):
        shape = (16, 224, 224) if name in ("mvit_v1_b", "mvit_v2_s", "s3d") else (8, 64, 64)
        real(
            name,
            functools.partial(get_model, name, weights=None),
            lambda shape=shape: torch.randn(1, 3, *shape),
            "video",
            seconds=600,
        )
    for name in list_models(module=models.detection):
        own_size = name.startswith("ssd")
        arguments = {} if own_size else dict(min_size=128, max_size=160)
        if "rcnn" in name:
            arguments |= dict(box_score_thresh=0.0, box_detections_per_img=5)
        else:
            arguments |= dict(score_thresh=0.0, detections_per_img=5)
        real(
            name,
            functools.partial(
                get_model, name, weights=None, weights_backbone=None, num_classes=4, **arguments
            ),
            lambda: ([torch.rand(3, 120, 150)],),
            "detection",
            seconds=600,
        )
    for name in list_models(module=models.optical_flow):
        real(
            name,
            functools.partial(get_model, name, weights=None),
            lambda: (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128), 1),
            "flow",
            refusable=True,
            double=False,
            tolerance=1e-4,
        )  # pixels are looked up at places that rounding moves; in float64 the difference is 0


def torchvision_in_small():
    """Register the quick half of torchvision: its classes, with few and narrow blocks."""
    from torchvision.models import (
        convnext,
        densenet,
        maxvit,
        mobilenet_v2,
        resnet,
        shufflenetv2,
        squeezenet,
    )
    from torchvision.models import (
        swin_transformer as swin,
    )
    from torchvision.models import (
        vision_transformer as vit,
    )
    from torchvision.models.video import mvit

    def small(name, build, size=32):
        real(name, build, image(size, 2), "small", quick=True)

    small("resnet", lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=10))
    small(
        "resnext",
        lambda: resnet.ResNet(
            resnet.Bottleneck, [1, 1, 1, 1], num_classes=10, groups=8, width_per_group=4
        ),
    )
    small("densenet", lambda: densenet.DenseNet(8, (2, 2, 2, 2), 16, num_classes=10))
    small("mobilenet_v2", lambda: mobilenet_v2(num_classes=10, width_mult=0.35))
    small(
        "shufflenet",
        lambda: shufflenetv2.ShuffleNetV2([1, 2, 1], [8, 16, 32, 64, 64], num_classes=10),
    )
    small("vit", lambda: vit.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10))
    small("swin", lambda: swin.SwinTransformer([2, 2], 16, [2, 2], [2, 4], [4, 4], num_classes=10))
    small(
        "swin_v2",
        lambda: swin.SwinTransformer(
            [2, 2],
            16,
            [2, 2],
            [2, 4],
            [4, 4],
            num_classes=10,
            block=swin.SwinTransformerBlockV2,
            downsample_layer=swin.PatchMergingV2,
        ),
    )
    small(
        "maxvit", lambda: maxvit.MaxVit((32, 32), 16, 4, [16, 16], [1, 1], 8, 0.1, num_classes=10)
    )
    small(
        "convnext",
        lambda: convnext.ConvNeXt(
            [convnext.CNBlockConfig(16, 32, 1), convnext.CNBlockConfig(32, None, 1)], num_classes=10
        ),
    )
    small("squeezenet", lambda: squeezenet.SqueezeNet("1_1", num_classes=10), 64)
    real(
        "mvit",
        lambda: mvit.MViT(
            (16, 16),
            4,
            [
                mvit.MSBlockConfig(1, 16, 32, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
                mvit.MSBlockConfig(2, 32, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 2, 2]),
            ],
            True,
            True,
            True,
            True,
            num_classes=10,
        ),
        lambda: torch.randn(1, 3, 4, 16, 16),
        "small",
        quick=True,
    )


# --- timm: one or two of a family ---

TIMM = [
    "resnet10t",
    "seresnext26ts",
    "ecaresnet26t",
    "skresnet18",
    "resnest14d",
    "res2net50_14w_8s",
    "resnetv2_50",
    "nf_regnet_b0",
    "eca_nfnet_l0",
    "convnextv2_atto",
    "regnety_002",
    "tf_efficientnetv2_b0",
    "mobilenetv4_conv_small",
    "mobilenetv4_hybrid_medium",
    "ghostnetv2_100",
    "fbnetc_100",
    "mixnet_s",
    "repvgg_a0",
    "mobileone_s0",
    "dla34",
    "dpn48b",
    "ese_vovnet19b_dw",
    "hrnet_w18_small",
    "cspresnet50",
    "cspdarknet53",
    "xception41",
    "inception_v4",
    "inception_next_atto",
    "selecsls42b",
    "tresnet_m",
    "mobilevit_xxs",
    "mobilevitv2_050",
    "edgenext_xx_small",
    "poolformer_s12",
    "convmixer_768_32",
    "fastvit_t8",
    "efficientformer_l1",
    "efficientvit_b0",
    "efficientvit_m0",
    "repvit_m0_9",
    "starnet_s1",
    "lcnet_035",
    "tinynet_e",
    "rdnet_tiny",
    "mambaout_femto",
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "cait_xxs24_224",
    "xcit_nano_12_p16_224",
    "pit_ti_224",
    "levit_128s",
    "coat_lite_tiny",
    "crossvit_tiny_240",
    "pvt_v2_b0",
    "twins_svt_small",
    "mixer_s32_224",
    "resmlp_12_224",
    "gmlp_s16_224",
    "eva02_tiny_patch14_224",
    "beit_base_patch16_224",
    "focalnet_tiny_srf",
    "nest_tiny",
    "volo_d1_224",
    "tnt_s_patch16_224",
    "davit_tiny",
    "gcvit_xxtiny",
    "swinv2_cr_tiny_224",
    "coatnet_pico_rw_224",
    "sequencer2d_s",
    "hiera_tiny_224",
    "tiny_vit_5m_224",
    "vit_tiny_r_s16_p8_224",
]


def timm_image(name):
    "Of 64 x 64 where the network takes any size."
    import timm

    config = timm.get_pretrained_cfg(name)
    if name in ("inception_v4",):
        return torch.randn(1, 3, 96, 96)
    return torch.randn(
        1,
        3,
        *((64, 64) if not config.fixed_input_size and config.pool_size else config.input_size[1:]),
    )


def timm_networks():
    def build(name):
        import timm

        return timm.create_model(name, num_classes=10)

    for name in TIMM:
        real(name, functools.partial(build, name), functools.partial(timm_image, name), "timm")


# --- transformers: tiny random configurations ---


def transformers_networks():
    def words(n=2, length=6, v=50):
        return lambda: dict(input_ids=torch.randint(3, v, (n, length)))

    def pixels(s=32):
        return lambda: dict(pixel_values=torch.randn(2, 3, s, s))

    text = dict(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    image_ = dict(
        image_size=32,
        patch_size=8,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    grouped = text | dict(num_key_value_heads=2, use_cache=False, pad_token_id=0)

    def put(name, kind, config, inputs, quick=False, **rest):
        def build():
            import transformers

            return getattr(transformers, kind)(getattr(transformers, config[0])(**config[1]))

        real(name, build, inputs, "transformers", quick=quick, **rest)

    put("bert", "BertForSequenceClassification", ("BertConfig", text), words(), quick=True)
    put(
        "bert_eager", "BertModel", ("BertConfig", text | dict(attn_implementation="eager")), words()
    )
    put("roberta", "RobertaForMaskedLM", ("RobertaConfig", text), words())
    put(
        "distilbert",
        "DistilBertForSequenceClassification",
        (
            "DistilBertConfig",
            dict(
                vocab_size=50,
                dim=32,
                n_layers=2,
                n_heads=4,
                hidden_dim=48,
                max_position_embeddings=16,
            ),
        ),
        words(),
    )
    put("albert", "AlbertModel", ("AlbertConfig", text | dict(embedding_size=16)), words())
    put("electra", "ElectraModel", ("ElectraConfig", text | dict(embedding_size=16)), words())
    put(
        "gpt2",
        "GPT2LMHeadModel",
        (
            "GPT2Config",
            dict(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4, use_cache=False),
        ),
        words(),
        quick=True,
    )
    put(
        "opt",
        "OPTForCausalLM",
        (
            "OPTConfig",
            dict(
                vocab_size=50,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                ffn_dim=48,
                max_position_embeddings=16,
                word_embed_proj_dim=32,
                use_cache=False,
            ),
        ),
        words(),
    )
    put("llama", "LlamaForCausalLM", ("LlamaConfig", grouped), words(), quick=True)
    put("llama_cache", "LlamaForCausalLM", ("LlamaConfig", grouped | dict(use_cache=True)), words())
    put("mistral", "MistralForCausalLM", ("MistralConfig", grouped), words())
    put(
        "qwen2",
        "Qwen2ForCausalLM",
        ("Qwen2Config", grouped | dict(tie_word_embeddings=True)),
        words(),
    )
    put("qwen3", "Qwen3ForCausalLM", ("Qwen3Config", grouped | dict(head_dim=8)), words())
    put("gemma", "GemmaForCausalLM", ("GemmaConfig", grouped | dict(head_dim=8)), words())
    put("phi3", "Phi3ForCausalLM", ("Phi3Config", grouped), words())
    put("gpt_neox", "GPTNeoXForCausalLM", ("GPTNeoXConfig", text | dict(use_cache=False)), words())
    put(
        "mixtral",
        "MixtralForCausalLM",
        ("MixtralConfig", grouped | dict(num_local_experts=3, num_experts_per_tok=2)),
        words(),
        refusable=True,
    )
    put(
        "t5",
        "T5ForConditionalGeneration",
        (
            "T5Config",
            dict(
                vocab_size=50,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                use_cache=False,
            ),
        ),
        lambda: words()() | dict(decoder_input_ids=torch.randint(50, (2, 4))),
    )
    put("vit", "ViTForImageClassification", ("ViTConfig", image_), pixels(), quick=True)
    put("deit", "DeiTForImageClassification", ("DeiTConfig", image_), pixels())
    put("dinov2", "Dinov2Model", ("Dinov2Config", image_), pixels())
    put(
        "swin",
        "SwinForImageClassification",
        (
            "SwinConfig",
            dict(
                image_size=32,
                patch_size=4,
                embed_dim=16,
                depths=[2, 2],
                num_heads=[2, 4],
                window_size=4,
            ),
        ),
        pixels(),
    )
    put(
        "convnext",
        "ConvNextForImageClassification",
        ("ConvNextConfig", dict(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2)),
        pixels(),
    )
    put(
        "segformer",
        "SegformerForSemanticSegmentation",
        (
            "SegformerConfig",
            dict(
                num_encoder_blocks=2,
                depths=[1, 1],
                sr_ratios=[2, 1],
                hidden_sizes=[16, 32],
                patch_sizes=[7, 3],
                strides=[4, 2],
                num_attention_heads=[2, 4],
                mlp_ratios=[2, 2],
                decoder_hidden_size=16,
            ),
        ),
        pixels(64),
    )
    clip = dict(text_config=text | dict(eos_token_id=1), vision_config=image_, projection_dim=16)
    put("clip", "CLIPModel", ("CLIPConfig", clip), lambda: words()() | pixels()())
    put(
        "whisper",
        "WhisperForConditionalGeneration",
        (
            "WhisperConfig",
            dict(
                vocab_size=50,
                num_mel_bins=8,
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=4,
                decoder_attention_heads=4,
                encoder_ffn_dim=48,
                decoder_ffn_dim=48,
                max_source_positions=20,
                max_target_positions=16,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
                use_cache=False,
            ),
        ),
        lambda: dict(
            input_features=torch.randn(1, 8, 40), decoder_input_ids=torch.randint(3, 50, (1, 4))
        ),
    )
    put(
        "wav2vec2",
        "Wav2Vec2Model",
        (
            "Wav2Vec2Config",
            text
            | dict(
                conv_dim=(16, 16),
                conv_stride=(5, 2),
                conv_kernel=(10, 3),
                num_conv_pos_embeddings=8,
                num_conv_pos_embedding_groups=2,
                num_feat_extract_layers=2,
                mask_time_prob=0.0,
            ),
        ),
        lambda: dict(input_values=torch.randn(1, 400)),
    )


own()
torchvision_in_small()
torchvision_networks()
if installed("timm"):
    timm_networks()
if installed("transformers"):
    transformers_networks()
