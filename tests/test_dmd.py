"""One iteration of distillation by hand: which numbers the two updates hand to the formulas.

All networks have random weights everywhere, so that text, time and first frames count.
"""

from dataclasses import replace

import pytest
import test_distill
import torch
from test_distill import fresh_run, settings
from test_rollout import with_random_weights
from torch import Tensor

import train.dmd as dmd
from configs.distillation import (
    GANConfig,
    OnPolicyConfig,
    RegressionConfig,
    ScoreConfig,
    StudentConfig,
)
from wan.errors import WanError
from wan.models.dit import WanDiT
from wan.sampling.samplers import sample_unipc
from wan.sampling.schedule import Schedule, few_step_schedule, shift_sigmas

pytestmark = test_distill.pytestmark
teacher = test_distill.teacher


@pytest.fixture
def iteration(tmp_path, teacher, monkeypatch):
    """A run with first frames and an adversarial term, and its state before the first step."""
    config = settings(tmp_path, teacher, first_frame_share=1.0, gan=GANConfig(weight=0.1))
    scores = replace(config.scores, negative_prompt="a blue star")
    run, state = fresh_run(replace(config, scores=scores), monkeypatch)
    for seed, network in enumerate((run.student, run.critic, run.teacher)):
        with_random_weights(network, seed)
    return run, state


def watch(monkeypatch, *names: str) -> dict[str, tuple]:
    """The arguments of the last call that train.dmd makes of each function."""
    found = {}

    def watched(name, function):
        def call(*args):
            found[name] = args
            return function(*args)

        return call

    for name in names:
        monkeypatch.setattr(dmd, name, watched(name, getattr(dmd, name)))
    return found


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def wide(sigma: Tensor) -> Tensor:
    return sigma[:, None, None, None, None]


def x0_seen(dit: WanDiT, x: Tensor, sigma: Tensor, context: Tensor, first: Tensor) -> Tensor:
    """What a network sees in x behind a given first frame, from the plain forward."""
    timestep = (1000 * sigma)[:, None].repeat(1, x.shape[2])
    timestep[:, 0] = 0
    velocity = dit(torch.cat([first, x[:, :, 1:]], dim=2), timestep, context)
    return (x - wide(sigma) * velocity)[:, :, 1:]


@torch.no_grad()
def test_the_student_leaves_the_critic_for_the_guided_teacher(iteration, monkeypatch):
    run, _ = iteration
    found = watch(monkeypatch, "add_noise", "loss_with_gradient")
    with torch.enable_grad():
        run.matching_loss(0, *run.batches(0, generator()))
    (x0, noise, sigma), (moved, gradient) = found["add_noise"], found["loss_with_gradient"]
    assert moved is x0
    x = (1 - wide(sigma)) * x0 + wide(sigma) * noise
    drawn, first = run.draw(0), x0[:, :, :1]
    assert torch.equal(first, drawn.latents[:, :, :1])
    context, negative = (run.texts(t)[0] for t in (drawn.captions, ["a blue star"] * 3))
    critic = x0_seen(run.critic, x, sigma, context, first)
    said, unsaid = (x0_seen(run.teacher, x, sigma, c, first) for c in (context, negative))
    assert (said - unsaid).abs().max() > 0.02
    wanted = unsaid + 2.0 * (said - unsaid)
    scale = (x0[:, :, 1:] - wanted).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(gradient[:, :, 1:], (critic - wanted) / scale, rtol=1e-3, atol=1e-3)
    assert gradient[:, :, 0].abs().max() == 0


def test_the_critic_learns_the_velocity_of_the_students_samples(iteration, monkeypatch):
    run, state = iteration
    found = watch(monkeypatch, "add_noise", "flow_matching_loss")
    with torch.no_grad():
        before = with_random_weights(WanDiT(test_distill.TINY), 1)
    run.update_critic(state, generator())
    (x0, noise, sigma), (velocity, target, weight) = found["add_noise"], found["flow_matching_loss"]
    assert torch.equal(target, noise - x0)
    assert weight[:, 0, :, 0, 0].tolist() == [[0, 1, 1, 1, 1]] * 3
    x = (1 - wide(sigma)) * x0 + wide(sigma) * noise
    context, _ = run.texts(run.draw(0).captions)
    seen = x0_seen(before, x, sigma, context, x0[:, :, :1])
    ours = (x - wide(sigma) * velocity)[:, :, 1:]
    torch.testing.assert_close(ours, seen, rtol=1e-3, atol=1e-3)


def test_clips_are_real_samples_fake_and_the_student_pays_for_being_found_out(
    iteration, monkeypatch
):
    run, state = iteration
    found = watch(
        monkeypatch, "add_noise", "discriminator_loss", "adversarial_loss", "loss_with_gradient"
    )
    verdicts = []

    def verdict(x0, *rest):
        verdicts.append(x0)
        return x0.mean(dim=(1, 2, 3, 4)) + 0 * run.discriminator.logits[0].bias

    monkeypatch.setattr(run, "logits", verdict)
    run.update_critic(state, generator())
    clips, samples = run.draw(0).latents, found["add_noise"][0]
    for sides, latents in zip(found["discriminator_loss"], (clips, samples), strict=True):
        torch.testing.assert_close(sides, latents.mean(dim=(1, 2, 3, 4)))
    run.matching_loss(0, *run.batches(0, generator()))
    assert verdicts[-1] is found["loss_with_gradient"][0]
    torch.testing.assert_close(found["adversarial_loss"][0], verdicts[-1].mean(dim=(1, 2, 3, 4)))


def test_regression_is_from_a_state_to_the_end_of_its_own_caption(tmp_path, teacher, monkeypatch):
    regression = RegressionConfig(weight=1.0, num_pairs=4, steps=4)
    run, _ = fresh_run(settings(tmp_path, teacher, regression=regression), monkeypatch)
    with_random_weights(run.student, 5)
    drawn, batch = [], run.trajectories.batch

    def drawn_batch(self, rows, sigmas):
        drawn.append((rows, sigmas))
        return batch(rows, sigmas)

    monkeypatch.setattr(type(run.trajectories), "batch", drawn_batch)
    found = watch(monkeypatch, "x0_at_exits")
    with torch.no_grad():
        loss = run.regression_loss(0, *next(run.pairs(generator())))
        ((rows, sigmas),) = drawn
        schedule = few_step_schedule([1000, 757, 522])
        steps = (schedule.sigmas[None, :3] == sigmas[:, None]).int().argmax(1)
        assert len({run.trajectories.captions[row] for row in rows}) > 1
        paths = torch.stack([run.trajectories.store.read(run.trajectories.keys[r]) for r in rows])
        paths = paths.float()  # (B, K + 1, C, T, H, W): the states, then the end
        x, end = paths[torch.arange(len(rows)), steps], paths[:, -1]
        context, _ = run.texts([run.trajectories.captions[row] for row in rows])
        assert torch.equal(found["x0_at_exits"][2].context, context)
        velocity = run.student(x, schedule.timesteps[steps], context)
        expected = (x - wide(schedule.sigmas[steps]) * velocity - end).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)


def test_settings_reach_the_chain_and_the_score_levels(tmp_path, teacher, monkeypatch):
    config = settings(
        tmp_path,
        teacher,
        student=StudentConfig(
            [1000, 600], deterministic=True, exits="late", truncate_gradient=False
        ),
        scores=ScoreConfig(shift=2.5, lowest=0.1, highest=0.9, clamp=False, critic_ratio=2),
    )
    run, _ = fresh_run(config, monkeypatch)
    found = watch(monkeypatch, "roll_out", "draw_exits", "sample_score_sigmas")
    run.matching_loss(0, *run.batches(0, generator()))
    assert found["draw_exits"][:3] == (3, 2, "late")
    _, _, schedule, _, noises, deterministic, _, truncate_gradient = found["roll_out"]
    assert (schedule.timesteps.tolist(), len(noises)) == ([1000, 600], 2)
    assert (deterministic, truncate_gradient) == (True, False)
    batch, shift, bounds, _, clamp, above = found["sample_score_sigmas"]
    assert (batch, shift, bounds, clamp, above) == (3, 2.5, (0.1, 0.9), False, None)


def test_a_sample_that_leaves_early_is_compared_above_its_next_step(tmp_path, teacher, monkeypatch):
    scores = ScoreConfig(phased=True, critic_ratio=2)
    run, state = fresh_run(settings(tmp_path, teacher, scores=scores), monkeypatch)
    found = watch(monkeypatch, "roll_out", "add_noise")
    following = torch.tensor([0.757, 0.522, 0.0])
    for update in (run.matching_loss, None):
        for seed in range(5):
            generator = torch.Generator().manual_seed(seed)
            if update is None:  # the critic learns the same levels
                run.update_critic(state, generator)
            else:
                update(0, *run.batches(0, generator))
            exits, sigma = found["roll_out"][3], found["add_noise"][2]
            assert (sigma >= following[exits] - 1e-3).all()
    beyond = settings(tmp_path, teacher, scores=replace(scores, highest=0.7))
    with pytest.raises(WanError, match=r"second step is at noise level 0.7567.*scores.highest=0.7"):
        dmd.student_schedules(beyond)


def test_a_share_of_the_teachers_views_is_unguided(tmp_path, teacher, monkeypatch):
    scores = ScoreConfig(3.0, critic_ratio=2, unguided_share=1.0, unguided_above=0.6)
    run, _ = fresh_run(settings(tmp_path, teacher, batch_size=12, scores=scores), monkeypatch)
    (batch,) = run.batches(0, generator())
    expected = torch.where(batch.sigma > 0.6, 1.0, 3.0)
    assert 0 < int((batch.sigma > 0.6).sum()) < 12
    assert batch.guidance.flatten().tolist() == expected.tolist()
    with_random_weights(run.teacher, 1)
    x = torch.randn(12, *run.shape, generator=generator())
    with torch.no_grad():
        each = dmd.guided_x0(
            run.teacher, x, batch.sigma, batch.condition, batch.null, batch.guidance
        )
        plain = dmd.predict_x0(run.teacher, x, batch.sigma, batch.condition)
        guided = dmd.guided_x0(run.teacher, x, batch.sigma, batch.condition, batch.null, 3.0)
    torch.testing.assert_close(
        each, torch.where(wide(batch.sigma) > 0.6, plain, guided), rtol=1e-4, atol=1e-4
    )


def test_a_share_of_the_teachers_views_is_of_clips(tmp_path, teacher, monkeypatch):
    scores = ScoreConfig(clip_share=1.0, clip_above=0.5, critic_ratio=2)
    run, _ = fresh_run(settings(tmp_path, teacher, batch_size=9, scores=scores), monkeypatch)
    found = watch(monkeypatch, "guided_x0", "roll_out")
    seen = []
    predict = dmd.predict_x0
    monkeypatch.setattr(dmd, "predict_x0", lambda *a: seen.append(a[1]) or predict(*a))
    (batch,) = run.batches(0, generator())
    torch.testing.assert_close(batch.clips, run.draw(0).latents)
    run.matching_loss(0, batch)
    by_critic, by_teacher = seen[0], found["guided_x0"][1]
    sigma = wide(batch.sigma)
    of_clips = (1 - sigma) * batch.clips + sigma * batch.noise
    shown = batch.sigma > 0.5
    assert 0 < int(shown.sum()) < 9
    torch.testing.assert_close(by_teacher[shown], of_clips[shown])
    assert torch.equal(by_teacher[~shown], by_critic[~shown])
    assert (by_critic - of_clips).abs().amax(dim=(1, 2, 3, 4)).min() > 0.1


def test_on_policy_regression_goes_from_the_students_states_along_the_teachers_flow(
    tmp_path, teacher, monkeypatch
):
    on_policy = OnPolicyConfig(weight=2.0, steps=3, guidance_scale=2.5, shift=4.0)
    run, state = fresh_run(settings(tmp_path, teacher, on_policy=on_policy), monkeypatch)
    for seed, network in enumerate((run.student, run.teacher)):
        with_random_weights(network, seed)
    found = watch(monkeypatch, "states_at_exits", "x0_at_exits", "follow_flow")
    (batch,) = run.batches(0, generator(), first_exit=1)
    assert set(batch.exits.tolist()) == {1, 2}
    with torch.no_grad():
        loss = run.on_policy_loss(0, batch)
        x, exits = found["x0_at_exits"][1], found["states_at_exits"][3]
        assert found["follow_flow"][1] is x
        assert exits is batch.exits
        levels = few_step_schedule([1000, 757, 522]).sigmas[exits]
        end = torch.empty_like(x)
        for j, level in enumerate(levels):  # each sample by itself, as sampling does
            grid = shift_sigmas(shift_sigmas(level, 1 / 4.0) * torch.linspace(1, 0, 4), 4.0)

            def velocity(x, timestep, j=j):
                level = torch.full((1,), timestep)
                said, unsaid = (
                    run.teacher(x, level, condition.context[j : j + 1])
                    for condition in (batch.condition, batch.null)
                )
                return unsaid + 2.5 * (said - unsaid)

            schedule = Schedule(grid[:-1] * 1000, grid, "")
            end[j : j + 1] = sample_unipc(velocity, x[j : j + 1], schedule)
        timesteps = torch.tensor([1000.0, 757, 522])[exits]
        velocity = run.student(x, timesteps, batch.condition.context)
        expected = (x - wide(levels) * velocity - end).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)
    values = run.update_student(state, generator())
    assert values["loss_student"] > 2 * values["on_policy"] > 0


def test_lists_of_steps_take_turns_in_chain_and_regression(tmp_path, teacher, monkeypatch):
    student = StudentConfig([1000, 757, 522], more_timesteps=[[1000, 900, 640]])
    regression = RegressionConfig(weight=1.0, num_pairs=2, steps=4)
    config = settings(tmp_path, teacher, student=student, regression=regression)
    run, _ = fresh_run(config, monkeypatch)
    assert run.trajectories.levels == pytest.approx([1, 0.9, 0.757, 0.64, 0.522], abs=1e-3)
    found = watch(monkeypatch, "roll_out", "x0_at_exits")
    matched, regressed = set(), set()
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        run.matching_loss(0, *run.batches(0, generator))
        matched.add(found["roll_out"][2].timesteps[1].item())
        schedule, numbers, exits = next(run.pairs(generator))
        run.regression_loss(0, schedule, numbers, exits)
        regressed.add(schedule.timesteps[1].item())
        x, levels = found["x0_at_exits"][1], schedule.sigmas[exits]
        states, _, _ = run.trajectories.batch(numbers.tolist(), levels)
        assert torch.equal(x, states)
    assert matched == regressed == {757, 900}
    with pytest.raises(WanError, match="same number of steps and begin with the same"):
        StudentConfig([1000, 757, 522], more_timesteps=[[1000, 900]])
