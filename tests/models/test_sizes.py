"""What a configuration says of a model, against models that were built."""

import pytest
from transformers import AutoModelForCausalLM

from aligndistil.commands.recipes import shipped_recipes
from aligndistil.models import KNOWN_MODELS, builtin_model, model_size
from aligndistil.recipe import load_recipe
from support.models import build_model


def test_parameters_are_counted_without_loading_weights():
    real = AutoModelForCausalLM.from_pretrained(builtin_model("builtin:tiny"))
    assert model_size("builtin:tiny").parameters == sum(p.numel() for p in real.parameters())


@pytest.mark.parametrize("path", ["Qwen/Qwen2-1.5B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"])
def test_the_models_of_the_paper_are_known_without_the_hub(path):
    # embedding 151,936 x 1,536, tied with the head: 233,373,696
    # a layer: q 2,360,832 + k, v 786,944 + o 2,359,296 + feed-forward 3 x 1,536 x 8,960 + norms 3,072 = 46,797,824
    # 28 layers, the last norm 1,536
    size = model_size(path)
    assert size.parameters == 233_373_696 + 28 * 46_797_824 + 1_536
    assert (size.hidden, size.layers, size.vocab, size.intermediate, size.kv_width) == (1536, 28, 151_936, 8960, 256)
    # tied, so that a scalar head takes nothing away
    assert model_size(path, scalar=True).parameters == size.parameters + 1536


def test_what_shipped_recipes_name_on_the_hub_is_known():
    named = {stage.model.path for path in shipped_recipes().values() for stage in load_recipe(path).stages.values()}
    on_hub = {path for path in named if not path.startswith(("builtin:", "stage:", "models/"))}
    assert on_hub == KNOWN_MODELS.keys()


@pytest.mark.parametrize("tied", [True, False])
def test_the_body_is_what_is_neither_embedding_nor_head(tied, tmp_path):
    model = build_model(tied=tied)
    model.save_pretrained(tmp_path)
    size = model_size(str(tmp_path))
    assert size.tied == tied
    embedding = model.get_input_embeddings().weight.numel()
    assert size.body == sum(p.numel() for p in model.model.parameters()) - embedding
    assert size.head == model.lm_head.weight.numel()


def test_adapters_are_two_thin_matrices_for_each_linear_layer_of_the_body():
    size, model = model_size("builtin:tiny"), AutoModelForCausalLM.from_pretrained(builtin_model("builtin:tiny"))
    layers = {name: one for name, one in model.model.named_modules() if type(one).__name__ == "Linear"}
    assert size.adapters(4, "all-linear") == sum(4 * (one.in_features + one.out_features) for one in layers.values())
    some = [one for name, one in layers.items() if name.endswith((".q_proj", ".v_proj"))]
    assert size.adapters(4, ["q_proj", "v_proj"]) == sum(4 * (one.in_features + one.out_features) for one in some)
    assert size.adapters(4, ["proj"]) == 0  # a part of a name is not its end


@pytest.mark.parametrize("family", ["mamba", "gpt2", "gemma3_text"])
def test_models_of_other_shapes_have_a_size_too(family, tmp_path):
    from transformers import AutoConfig

    settings = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 96}
    if family == "gpt2":
        settings = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 96}
    if family == "gemma3_text":
        settings |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24, "intermediate_size": 64}
    config = AutoConfig.for_model(family, **settings)
    config.save_pretrained(tmp_path)
    size = model_size(str(tmp_path))
    assert size.parameters == sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    assert 0 < size.adapters(1, "all-linear") < size.body
    if family == "gemma3_text":
        assert (size.q_width, size.kv_width) == (48, 24)
