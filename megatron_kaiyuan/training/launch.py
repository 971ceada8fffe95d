"""From the command line to Megatron's training loop. What can be wrong is looked at before the loop starts."""

import argparse
from functools import partial
from typing import Any

from megatron.core.enums import ModelType
from megatron.training import get_args, get_tokenizer, pretrain
from megatron.training.utils import print_rank_0

from megatron_kaiyuan.arguments import (
    check_required_arguments,
    check_save_arguments,
    defaults_without_optional_kernels,
)
from megatron_kaiyuan.checkpoints.identity import AVERAGING, store_tokenizer
from megatron_kaiyuan.checkpoints.lineage import CODE, store_start
from megatron_kaiyuan.checkpoints.megatron_files import open_checkpoints_as_data, write_checkpoints_to_stay
from megatron_kaiyuan.checkpoints.recovery import Start, agree_on_start
from megatron_kaiyuan.checkpoints.save_helper import watch_save_helper
from megatron_kaiyuan.data import Plan
from megatron_kaiyuan.flags.complaints import no_silent_end
from megatron_kaiyuan.host import cpu_platform
from megatron_kaiyuan.host.cut_files import leave_bus_errors_to_parent, name_cut_files
from megatron_kaiyuan.host.parent_death import become_helper
from megatron_kaiyuan.model.builder import kaiyuan_builder
from megatron_kaiyuan.model.config import model_options_from_args
from megatron_kaiyuan.model.products import keep_partial_sums_in_fp32
from megatron_kaiyuan.model.stages import embedding_ranks
from megatron_kaiyuan.monitoring.branch_scale import continue_branch_scale
from megatron_kaiyuan.training import compat
from megatron_kaiyuan.training.average_evaluation import check_average_arguments
from megatron_kaiyuan.training.blend import check_data_arguments
from megatron_kaiyuan.training.checkpoint_keeping import (
    keep_checkpoints,
    plan_averaging,
    say_how_to_average,
    say_what_cannot_be_averaged,
)
from megatron_kaiyuan.training.forward_step import ForwardStep
from megatron_kaiyuan.training.load_arguments import check_load
from megatron_kaiyuan.training.loaded_model import load_all_tensors_or_none, read_loaded_model
from megatron_kaiyuan.training.memory import check_memory
from megatron_kaiyuan.training.observation import build_held_out, build_monitor, check_event_place, keep_events
from megatron_kaiyuan.training.parsing import (
    check_flags,
    configuration,
    known_flags,
    parse,
    tell_what_building_refuses,
    validate,
)
from megatron_kaiyuan.training.plain_data import PlainDatasetsProvider
from megatron_kaiyuan.training.plain_splits import settle_splits
from megatron_kaiyuan.training.plan_arguments import (
    check_plan_arguments,
    check_tokenizer_of_shards,
    plan_argument_defaults,
    plan_parser_defaults,
)
from megatron_kaiyuan.training.plan_evaluations import settle_evaluations
from megatron_kaiyuan.training.plan_record import check_resume, plan_as_begun, store_record
from megatron_kaiyuan.training.provider import PlanDatasetsProvider
from megatron_kaiyuan.training.run_length import (
    check_batch_arguments,
    check_skipped_steps,
    final_iteration,
    is_complete,
)
from megatron_kaiyuan.training.schedule_arguments import check_rates_of_plan, continue_schedule, steps_in_samples
from megatron_kaiyuan.training.scheduler import PlannedScheduler, plan_has_learning_rate
from megatron_kaiyuan.training.stopping import explain_invalid_results, stop_when_asked

__all__ = ["run_pretraining"]


def run_pretraining() -> None:
    """Parse the command line, check it, and train.

    Raises:
        KaiyuanError: a mistake in the flags, the plan or the data; raised before any model is built.
    """
    name_cut_files()
    args, plan, saved, start = _configure()
    store_record(args, plan)
    store_start(args, saved, start.name)
    print_rank_0(f"> megatron_kaiyuan {getattr(args, CODE)}")
    last = final_iteration(args, saved)
    setattr(args, AVERAGING, plan_averaging(args, plan, last))
    check_skipped_steps(args, (getattr(args, AVERAGING) or {"iterations": ()})["iterations"])
    if is_complete(args, saved):
        print_rank_0(f"> --load {args.load}: the run is complete, nothing is left to train on")
        say_how_to_average(args)
        return
    say_what_cannot_be_averaged(args, 0 if saved is None else saved.iteration)
    check_average_arguments(
        args, planned=getattr(args, AVERAGING) is not None, held_out=plan is not None and bool(args.eval_iters)
    )
    keeper = keep_checkpoints(args)
    compat.end_at(last)
    stop_when_asked(args)
    write_checkpoints_to_stay(args)
    tell_what_building_refuses()
    compat.log_each_step_once()
    explain_invalid_results(args)
    compat.keep_shipped_dataset_helpers()
    compat.repair_distributed_torch_adam()
    compat.repair_checkpoints_before_first_step()
    compat.write_checkpoints(asynchronous=args.async_save)
    if args.async_save:
        watch_save_helper()
    compat.initialize_loader_workers(_become_loader_worker)
    compat.fuse_weight_gradients_without_apex()
    load_all_tensors_or_none()
    if args.fp16:
        keep_partial_sums_in_fp32()
        print_rank_0("> FP16 matrix products keep their partial sums in FP32")
    if plan is not None and plan_has_learning_rate(plan):
        _follow_planned_rate(args, plan)
    check_memory(args)
    tokenizer = get_tokenizer()
    datasets = (
        PlainDatasetsProvider(args)
        if plan is None
        else PlanDatasetsProvider(plan, args, tokenizer.eod, tokenizer.vocab_size)
    )
    held_out = None
    if isinstance(datasets, PlanDatasetsProvider):
        held_out = build_held_out(args, datasets.plan, datasets.evaluation_batches, keeper)
    pretrain(
        configuration(args),
        datasets,
        ModelType.encoder_or_decoder,
        ForwardStep(build_monitor(args, plan), held_out, plan is not None and plan.longest > plan.seq_length),
        model_provider=partial(kaiyuan_builder, args),
        get_embedding_ranks=partial(embedding_ranks, args),
    )
    say_how_to_average(args)


def _become_loader_worker() -> None:
    become_helper()
    leave_bus_errors_to_parent()


def _configure() -> tuple[argparse.Namespace, Plan | None, argparse.Namespace | None, Start]:
    """Arguments as Megatron validated them, the plan if there is one, arguments of the run to continue, the start."""
    open_checkpoints_as_data()
    defaults = _platform_defaults()
    first_look = parse(defaults)
    plan = None if first_look.plan is None else Plan.load(first_look.plan)
    start = agree_on_start(first_look)
    if start.step is not None:
        first_look.ckpt_step = start.step
    if first_look.save:
        defaults["exit_signal_handler"] = True  # of no use without a place to save
    check_load(first_look)
    with no_silent_end(known_flags()):
        loaded = read_loaded_model(first_look)
    saved = loaded.arguments if loaded is not None and loaded.continues else None
    model = {} if loaded is None else loaded.options(first_look)
    vars(first_look).update(model)
    check_flags(first_look, {**defaults, **model})
    plan = plan_as_begun(plan, saved)
    plan_values: dict[str, Any] = {}
    in_samples: dict[str, object] = {}
    tokenizer_record = None if plan is None else plan.tokenizer_record
    if plan is None:
        check_data_arguments(first_look)
    else:
        defaults.update(plan_parser_defaults())
        check_rates_of_plan(first_look, plan, known_flags())
        in_samples = steps_in_samples(first_look, known_flags())
        plan_values = plan_argument_defaults(first_look, plan, saved, tokenizer_record)
    check_required_arguments(first_look, plan_values)
    check_save_arguments(first_look)
    check_event_place(first_look)
    model_options_from_args(first_look)
    parsed_defaults = {**defaults, **model} | ({} if start.step is None else {"ckpt_step": start.step})
    args = validate(parsed_defaults, plan_values, in_samples)
    keep_events()
    _say_aloud(defaults, plan_values)
    if plan is not None:
        check_tokenizer_of_shards(args, tokenizer_record, get_tokenizer().eod)
    store_tokenizer(args, tokenizer_record, get_tokenizer(), planned=plan is not None)
    if loaded is not None:
        loaded.check(args)
    if said := continue_branch_scale(args, None if loaded is None else loaded.arguments):
        print_rank_0(f"> {said}")
    check_resume(args, plan, saved)
    planned_rate = plan is not None and plan_has_learning_rate(plan)
    if said := continue_schedule(args, saved, known_flags(), planned_rate=planned_rate):
        print_rank_0(f"> {said}")
    check_batch_arguments(args, saved, planned=plan is not None)
    if plan is not None:
        check_plan_arguments(args, plan)
        plan.check_vocabulary(get_tokenizer().vocab_size)
    if said := settle_splits(args) if plan is None else settle_evaluations(args, plan):
        print_rank_0(f"> {said}")
    return args, plan, saved, start


def _platform_defaults() -> dict[str, object]:
    # Megatron divides by --eval-interval and gives it no default in this version.
    defaults: dict[str, object] = {"eval_interval": 1000}
    defaults.update(defaults_without_optional_kernels())
    if cpu_platform.is_installed():
        defaults.update(cpu_platform.CPU_ARGUMENT_DEFAULTS)
    return defaults


def _say_aloud(defaults: dict[str, object], plan_values: dict[str, object]) -> None:
    """Print the defaults that are not Megatron's, and which of them the command line overrode."""
    args = get_args()
    where = "without CUDA" if cpu_platform.is_installed() else "with CUDA"
    for name, value in {**defaults, **plan_values}.items():
        origin = "the plan" if name in plan_values else f"this platform ({where})"
        actual = getattr(args, name)
        note = "" if actual == value else f", overridden: {actual}"
        print_rank_0(f"> default from {origin}: {name} = {value}{note}")


def _follow_planned_rate(args: argparse.Namespace, plan: Plan) -> None:
    print_rank_0("> the phases of the plan give the learning rate")
    compat.use_scheduler(partial(PlannedScheduler, plan=plan, consumed_samples=lambda: args.consumed_train_samples))
