"""The installed mergekit and transformers have every name that this project uses, with the interface it was built on.

If something here fails, a release has changed: read what changed, mend its users, run the tests of merging, and only then
admit the release in `utils/mergekit_api.py` and requirements.txt.
"""

import dataclasses
import enum
import inspect
import re
import subprocess
import sys

import pytest
from pydantic import BaseModel

from tests.conftest import ROOT
from tests.refusals import refusal_code, refused
from utils import mergekit_api

# name: parameters of a function or class, fields of a model or dataclass, members of an enumeration
INTERFACES = {
    "BasePolicy": "OPTIONAL,REQUIRED,FORBIDDEN,IGNORED",
    "BuildTokenizer": "base_model,referenced_models,tokenizer_source,add_tokens,trust_remote_code",
    "ConditionalParameter": "value,filter",
    "ConsensusMethod": "count,sum",
    "ExecuteMergeMethodTask": "method_name,gather_tensors,model_order,base_model,output_weight,parameters,input_parameters,dtype,out_dtype",
    "Executor": "targets,math_device,storage_device,cached_values",
    "FinalizeModel": "tensor_save_tasks,writer_task",
    "GatherTensors": "weight_info,dtype,device",
    "GeneralizedTaskArithmeticMerge": "consensus_method,sparsification_method,default_normalize,default_rescale,method_name,method_pretty_name,method_reference_url",
    "GroupMergeMethod": "",
    "InputContract": "base,min_inputs,max_inputs,min_non_base,max_non_base",
    "JsonModuleArchitecture": "kind,definition",
    "LoaderCache": "",
    "MergeConfiguration": "modules,slices,models,merge_method,base_model,dtype,tokenizer_source,tokenizer,chat_template,out_dtype,parameters",
    "MergeMethod": "",
    "MergeMethodSpec": "name,parameters,contract,pretty_name,reference_url,optional_tensor_policy,uses_accelerator",
    "MergeOptions": "allow_crimes,unsafe_truncate_embeddings,transformers_cache,lora_merge_cache,lora_merge_dtype,cuda,device,low_cpu_memory,out_shard_size,copy_tokenizer,clone_tensors,trust_remote_code,random_seed,lazy_unpickle,write_model_card,safe_serialization,verbosity,quiet,read_to_gpu,multi_gpu,num_threads,gpu_rich,async_write,write_threads",
    "MergePlanner": "config,arch_info,options,out_model_config",
    "ModelArchitecture": "modules,architectures,expected_model_type,tagalong_files,vocab_size_config_key",
    "ModelPath": "path,revision",
    "ModuleArchitecture": "",
    "ModuleDefinition": "architecture,weight_prefix,subfolder",
    "ModelReference": "model,lora,override_architecture",
    "MultiGPUExecutor": "targets,num_gpus,storage_device",
    "ParameterScope": "SHARED,INPUT,NON_BASE",
    "ParameterSpec": "name,value_type,scope,default,description,batch_tensor,_adapter",
    "RescaleNorm": "l1,l2,linf",
    "SaveTensor": "tensor_name,tensor_task,writer_task,clone,optional,dtype,force_main_thread",
    "SparsificationMethod": "magnitude,random,magnitude_outliers,della_magprune",
    "TaskUniverse": "tasks",
    "TensorEntry": "id,tensor,is_base",
    "TensorGroup": "entries,metadata",
    "TensorWriter": "out_path,max_shard_size,safe_serialization,override_basename,use_async,max_write_threads",
    "PermutedVocabulary": "gather_tensors,tokenizer_task,tokens,pad_to_multiple_of,base_model,vocabulary_axis",
    "TensorWriterTask": "out_path,max_shard_size,safe_serialization,override_basename,use_async,write_threads",
    "TokenizerInfo": "tokenizer,permutations,original_vocabs",
    "WeightInfo": "name,vocabulary_axis,optional,aliases,force_dtype,tied_names",
    "arch_info_for_config": "config",
    "can_convert_checkpoint_keys": "model_type,source_keys,target_key",
    "dtype_from_name": "name",
    "get_auto_cls": "arch_name",
    "get_checkpoint_conversion_mapping": "model_type",
    "get_transformers_info": "model,options",
    "infer_architecture_info": "models,base_model,options",
    "linear_merge": "groups,parameters,dtype,out_dtype,batch_options",
    "merge_method": "name",
    "register_merge_method": "method",
    "rescaled_masked_tensor": "tensor,mask,norm,eps",
    "result_config": "config,arch_info,trust_remote_code",
    "set_chat_template": "tokenizer,merge_config,trust_remote_code",
    "set_config_value": "config,key,value",
}
# what is used of the objects beyond that
ATTRIBUTES = {
    "ExecuteMergeMethodTask": "group_label",
    "Executor": "run",
    "GroupMergeMethod": "merge_group,_execute_resolved",
    "JsonModuleArchitecture": "layer_weights,num_layers,post_weights,pre_weights",
    "LoaderCache": "flush_all,loaders,setup",
    "MergePlanner": "plan_to_disk",
    "ModelArchitecture": "all_weights",
    "ModelReference": "config,merged",
    "MultiGPUExecutor": "run",
    "TaskUniverse": "add_task",
    "TensorGroup": "base,non_base",
    "TensorWriter": "finalize,save_tensor",
}


def interface(thing) -> str:
    if isinstance(thing, type) and issubclass(thing, enum.Enum):
        names = [member.name for member in thing]
    elif isinstance(thing, type) and issubclass(thing, BaseModel):
        names = list(thing.model_fields)
    elif dataclasses.is_dataclass(thing):
        names = [field.name for field in dataclasses.fields(thing)]
    else:
        names = list(inspect.signature(thing).parameters)
    return ",".join(names)


def is_from_outside(name: str, thing) -> bool:
    origin = getattr(thing, "__module__", "")
    return not name.startswith("_") and origin.split(".")[0] in ("mergekit", "transformers")


def test_the_door_has_no_name_that_is_not_compared():
    assert {name for name, thing in vars(mergekit_api).items() if is_from_outside(name, thing)} == set(INTERFACES)


@pytest.mark.parametrize("name", INTERFACES)
def test_a_name_has_the_interface_that_was_built_on(name):
    thing = getattr(mergekit_api, name)
    assert interface(thing) == INTERFACES[name]
    for attribute in ATTRIBUTES.get(name, "").split(",") if name in ATTRIBUTES else ():
        assert hasattr(thing, attribute), f"{name}.{attribute}"


def test_sparsifiers_are_where_they_are_replaced_and_take_what_the_replacements_take():
    from mergekit import sparsify

    assert interface(sparsify.magnitude) == "tensor,density,rescale_norm"
    assert interface(sparsify.magnitude_outliers) == "tensor,density,rescale_norm,gamma"
    calls = []

    def counting(original):
        return lambda *given, **named: calls.append(1) or original(*given, **named)

    import torch

    with mergekit_api.replaced_sparsifiers(counting, counting):
        for method in ("magnitude", "magnitude_outliers"):
            sparsify.sparsify(torch.ones(4), 0.5, mergekit_api.SparsificationMethod(method))
    sparsify.sparsify(torch.ones(4), 0.5, mergekit_api.SparsificationMethod.magnitude)
    assert len(calls) == 2


def test_conversions_of_transformers_rename_keys():
    rules = mergekit_api.get_checkpoint_conversion_mapping("mixtral")
    renamed = [rule.rename_source_key("model.layers.0.block_sparse_moe.experts.0.w1.weight") for rule in rules]
    assert any(pattern for _, pattern in renamed)
    assert all(rule.target_patterns for rule in rules)


def test_vocabularies_are_listed_by_id_while_a_union_is_built(tmp_path):
    from transformers import AutoTokenizer

    from tests.tiny_pairs import save_tokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(tmp_path))
    with mergekit_api.vocabularies_by_id():
        assert list(tokenizer.get_vocab().values()) == sorted(tokenizer.get_vocab().values())


@pytest.mark.parametrize("version", ["0.1.4", "0.1.6", "0.2.0"])
def test_another_release_is_refused_with_those_that_work(monkeypatch, version):
    monkeypatch.setattr("importlib.metadata.version", lambda _name: version)
    with refused("mergekit-version") as caught:
        mergekit_api.check_release()
    assert f"mergekit {version} is installed; this project works with 0.1.5" in str(caught.value)


def run_with(preparation: str) -> subprocess.CompletedProcess:
    program = (
        f"{preparation}\n"
        "from utils.errors import run_command\n"
        "def main():\n    import utils.mergekit_api\n"
        "run_command(main)\n"
    )
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_release_is_checked_before_mergekit_is_imported():
    done = run_with(
        "import sys, importlib.metadata as m\nm.version = lambda name: '0.1.6'\nsys.modules['mergekit'] = None"
    )
    assert refusal_code(done) == "mergekit-version" and "0.1.5" in done.stderr


def test_a_name_that_is_missing_is_one_message():
    done = run_with("import mergekit.plan\ndel mergekit.plan.MergePlanner")
    assert refusal_code(done) == "mergekit-version" and done.stderr.count("\n") == 1, done.stderr
    assert "MergePlanner" in done.stderr and "0.1.5" in done.stderr


def test_requirements_admit_the_releases_that_the_door_opens_for():
    pinned = re.findall(r"^mergekit==(\S+)", (ROOT / "requirements.txt").read_text(), flags=re.M)
    assert pinned == list(mergekit_api.RELEASES)
