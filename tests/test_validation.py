"""What a save measures of the student, against numbers that are known."""

from types import SimpleNamespace

import pytest
import test_distill
import torch
from PIL import Image
from torch import nn

from train.dmd import Distillation
from train.parallel import ALONE
from train.validation import (
    RATIOS,
    SATURATED,
    ClipNumbers,
    Pictures,
    diversity,
    health,
    measure_clip,
    motion,
    panel_numbers,
    ratios,
    saturated_share,
    saturation,
    sheet_of,
    spread,
    world_panel,
    write_panel,
)
from wan.media.labels import LINE_HEIGHT
from wan.miniature.world import OBJECT_ATTRIBUTES

teacher = test_distill.teacher


def plain(red: float, green: float, blue: float, frames: int = 3) -> torch.Tensor:
    """A video (3, F, 16, 16) of one colour."""
    colour = torch.tensor([red, green, blue])[:, None, None, None]
    return colour.expand(3, frames, 16, 16).clone()


def flashing(change: float) -> torch.Tensor:
    """(3, 5, 4, 4): every pixel moves up and down by `change` from frame to frame."""
    return (change * (torch.arange(5) % 2)).float()[:, None, None].expand(3, 5, 4, 4)


def measured(latents: torch.Tensor, video: torch.Tensor, stated=None) -> list[ClipNumbers]:
    """The numbers of clips with these latents (B, C, T, h, w), which all show one video."""
    return [measure_clip(clip, video, stated) for clip in latents]


def test_motion_is_the_change_of_a_pixel_per_frame():
    assert motion(flashing(0.3)) == pytest.approx(0.3)
    assert motion(flashing(0.3)[:, :1]) == 0


def test_saturation_is_the_spread_of_the_channels_whatever_the_brightness():
    grey, coloured = plain(0.8, 0.8, 0.8), plain(1.0, 0.0, -0.5)
    assert saturation(grey) == 0
    assert saturation(coloured) == pytest.approx(1.5)
    assert saturation(torch.cat([grey, coloured], dim=1)) == pytest.approx(0.75)


def test_latents_are_saturated_beyond_three_deviations_of_either_sign():
    latents = torch.zeros(1, 4, 2, 5, 5)  # 200 numbers
    latents[0, 0, 0, 0, :3] = torch.tensor([SATURATED + 0.1, -SATURATED - 0.1, SATURATED])
    assert saturated_share(latents) == pytest.approx(2 / 200)
    normal = torch.randn(10**6, generator=torch.Generator().manual_seed(0))
    assert saturated_share(normal) == pytest.approx(0.0027, rel=0.1)


def test_diversity_is_what_two_clips_of_a_caption_differ_by_overall_and_not_where():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(3, 4, 2, 5, 5, generator=generator)
    elsewhere = one.flip(-1)  # the same things in other places
    still = plain(0.0, 0.0, 0.0)
    assert diversity(measured(torch.cat([one, elsewhere]), still)) == pytest.approx(0, abs=1e-6)
    tinted = elsewhere.clone()
    tinted[1, :2] += 0.6  # two of four channels of one caption in three
    tinted = measured(torch.cat([one, tinted]), still)
    assert diversity(tinted) == pytest.approx(0.6 * 0.5**0.5 / 3, rel=1e-5)


def test_the_spread_of_clips_is_that_of_all_their_latents_together():
    latents = torch.randn(3, 4, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    latents += torch.arange(3)[:, None, None, None, None]
    clips = measured(latents, plain(0.0, 0.0, 0.0))
    assert spread(clips) == pytest.approx(float(latents.double().std()), rel=1e-12)


def test_the_panel_asks_for_one_object_for_two_and_for_something_left_open():
    panel = world_panel(30, seed=0)
    unsaid = [
        sum(getattr(one, name) is None for one in said.objects for name in OBJECT_ATTRIBUTES)
        + (said.background is None)
        for said in panel
    ]
    assert [len(said.objects) for said in panel] == [1, 2, 1] * 10
    assert sum(unsaid[0::3]) == sum(unsaid[1::3]) == 0
    assert sum(map(bool, unsaid[2::3])) >= 7
    assert world_panel(4, seed=0) == panel[:4]


def test_ratios_are_student_over_teacher():
    noise = torch.randn(2, 4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    colours = plain(0.4, 0.0, 0.0, frames=5)[..., :4, :4]
    teacher = measured(noise, flashing(0.4) + colours)
    student = measured(1.5 * noise, flashing(0.1) + 2 * colours)
    values = ratios(student, teacher)
    assert values["motion_ratio"] == pytest.approx(0.25, rel=1e-4)
    assert values["saturation_ratio"] == pytest.approx(2.0, rel=1e-4)
    assert values["spread_ratio"] == pytest.approx(1.5, rel=1e-4)
    assert values["diversity_ratio"] == pytest.approx(1.5, rel=1e-4)
    assert set(ratios(teacher, teacher).values()) == {1.0}


def test_two_that_stand_still_are_equally_healthy():
    still = measured(torch.ones(2, 4, 1, 2, 2).cumsum(1), plain(0.1, 0.1, 0.1))
    assert health(ratios(still, still)) == 1


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_health_falls_the_same_way_with_too_little_and_too_much(ratio):
    well = dict.fromkeys(RATIOS, 1.0)
    assert health(well) == 1
    for name in well:
        assert health(well | {name: ratio}) == pytest.approx(0.5)
    assert health(well | {"val_joint": 0.0}) == 0.5
    assert health(dict.fromkeys(well, 0.0)) == 0


def test_the_panel_reads_videos_only_where_it_knows_the_world():
    latents = torch.randn(2, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    video = plain(0.3, 0.1, 0.0, frames=9)
    unknown = measured(latents, video)
    assert panel_numbers(unknown, unknown).keys() == {*RATIOS, "health"}
    known = measured(latents, video, world_panel(1, seed=0)[0])
    values = panel_numbers(known, known)
    assert values["val_joint"] == values["teacher_joint"] == 0  # nothing moves there
    assert values["health"] == pytest.approx(0.5)


class Sees(nn.Module):
    """A network that sees one clean latent in everything; with a caption another than without."""

    def __init__(self, with_caption: float, without: float) -> None:
        super().__init__()
        self.seen = torch.tensor([without, with_caption])

    def forward(self, x, timestep, context, num_rows):
        said = context[:, 0, 0].long()  # 1 where there is a caption
        x0 = self.seen[said][:, None, None, None, None]
        sigma = timestep[:, None, None, None, None] / 1000
        return (x - x0) / sigma


def test_the_triptych_is_student_then_guided_teacher_then_critic():
    run = SimpleNamespace(
        texts=lambda texts: (torch.tensor([float(t != "") for t in texts])[:, None, None], 1),
        config=SimpleNamespace(
            scores=SimpleNamespace(negative_prompt="", guidance_scale=3.0), bfloat16=False
        ),
        device=torch.device("cpu"),
        ranks=ALONE,
        shape=(4, 1, 2, 2),
        teacher=Sees(5.0, 4.0),
        critic=Sees(-7.0, 0.0),
    )
    run.autocast = lambda: Distillation.autocast(run)
    x0 = torch.full((1, 4, 1, 2, 2), 2.0)
    three = Distillation.triptych(run, x0, "a red circle")
    torch.testing.assert_close(three[0], x0[0])  # the student's own, as it was sampled
    torch.testing.assert_close(three[1], torch.full((4, 1, 2, 2), 4 + 3.0 * (5 - 4)))
    torch.testing.assert_close(three[2], torch.full((4, 1, 2, 2), -7.0))
    run.critic = None
    torch.testing.assert_close(Distillation.triptych(run, x0, "a red circle"), three[:2])


RED, GREEN, BLUE = (plain(*(1.0 if i == n else -1.0 for i in range(3))) for n in range(3))


def rows_of(path, count: int) -> list[str]:
    """Which channel leads in each row of sheets; each has a heading of one line."""
    image = Image.open(path)
    height = image.height // count
    places = [height * i + LINE_HEIGHT + 8 for i in range(count)]  # in the first frame
    return ["RGB"[image.getpixel((8, place)).index(255)] for place in places]


def shown(*videos: torch.Tensor) -> list[ClipNumbers]:
    return [measure_clip(torch.zeros(4, 1, 2, 2), video, shown=True) for video in videos]


THREE = [sheet_of(video) for video in (RED, GREEN, BLUE)]


def test_pictures_show_student_above_teacher_and_the_triptych_in_its_order(tmp_path):
    unseen = measured(torch.zeros(1, 4, 1, 2, 2), GREEN)  # a clip beyond those that are shown
    pictures = Pictures(tmp_path / "samples", 7)
    write_panel(
        pictures,
        ["a", "b", "c"],
        [*shown(RED, GREEN), *unseen],
        [*shown(BLUE, BLUE), *unseen],
        THREE,
    )
    pictures.close(ALONE)
    assert rows_of(tmp_path / "samples/0000007-triptych.png", 3) == ["R", "G", "B"]
    assert rows_of(tmp_path / "samples/0000007-student-teacher.png", 4) == ["R", "B", "G", "B"]


def test_a_disk_without_room_for_pictures_is_told_and_nothing_of_them_stays(tmp_path, capsys):
    def disk_full(path):
        raise OSError(28, "No space left on device")

    (tmp_path / "0000006-0.mp4").touch()
    pictures = Pictures(tmp_path, 7)
    write_panel(pictures, ["a"], shown(RED), shown(BLUE), THREE)
    pictures.write("0.mp4", disk_full)
    pictures.close(ALONE)
    assert [path.name for path in tmp_path.iterdir()] == ["0000006-0.mp4"]
    assert "no pictures of step 7: [Errno 28] No space left" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*matrices of zeros")
def test_pictures_that_cannot_be_written_cost_neither_checkpoint_nor_health(
    tmp_path, teacher, capsys
):
    config = test_distill.settings(tmp_path, teacher)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/samples").touch()  # no folder can be made there
    assert test_distill.distill(config) == 0
    assert (tmp_path / "run/checkpoints/step-0000004/manifest.json").exists()
    assert [x["step"] for x in test_distill.metrics(config) if "health" in x] == [1, 3]
    assert capsys.readouterr().err.count("no pictures of step") == 2
