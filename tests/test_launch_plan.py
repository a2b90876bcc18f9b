"""What the CUDA operators launch: plans are pure functions of params, compiled for the host."""

import cuda_params
import ptx_backend
import pytest

ALIGNED = 1 << 20
ROWS = cuda_params.RowLayout(
    num_rows=64, page_stride=4 * 128, row_stride=0, head_stride=128, block_size=1
)


def rope(rotary_dim=128, interleaved=False, cos=ALIGNED):
    return cuda_params.RopeTables(cos, ALIGNED, 64, rotary_dim, interleaved)


def rope_rotate(**changes):
    members = {
        "x": ALIGNED,
        "out": ALIGNED,
        "x_layout": ROWS,
        "out_layout": ROWS,
        "num_rows": 10,
        "destinations": 1,
        "num_heads": 4,
        "head_dim": 128,
        "rope": rope(),
        "dtype": 2,
        **changes,
    }
    members.setdefault("out_dtype", members["dtype"])
    return ptx_backend.plan("rope_rotate", cuda_params.RopeRotateParams(**members))


def kernel_of(plan):
    return plan.launches[0].name.decode().removeprefix("tokendance_")


def test_nothing_to_do_is_no_launch():
    assert rope_rotate(num_rows=0).num_launches == 0
    assert rope_rotate(destinations=0).num_launches == 0


def test_grid_covers_every_task():
    # 8 tasks of two 16-byte vectors in each of 4 heads: 8 rows fill a block.
    launch = rope_rotate().launches[0]
    assert (list(launch.grid), list(launch.block)) == ([2, 1, 1], [8, 4, 8])
    # 40 heads: 320 tasks, more than a block has threads.
    launch = rope_rotate(num_heads=40).launches[0]
    assert (list(launch.grid), list(launch.block)) == ([10, 2, 1], [8, 20, 1])
    # 5 heads: 40 tasks, 6 rows make 240.
    launch = rope_rotate(num_heads=5).launches[0]
    assert (list(launch.grid), list(launch.block)) == ([2, 1, 1], [8, 5, 6])


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({}, "rope_rotate_bf16_half_wide"),
        ({"dtype": 1}, "rope_rotate_f16_half_wide"),
        ({"dtype": 0}, "rope_rotate_f32_half_wide"),
        ({"rope": rope(interleaved=True)}, "rope_rotate_bf16_interleaved_wide"),
        ({"x": ALIGNED + 2}, "rope_rotate_bf16_half_narrow"),
        ({"out": ALIGNED + 8}, "rope_rotate_bf16_half_narrow"),
        ({"rope": rope(cos=ALIGNED + 4)}, "rope_rotate_bf16_half_narrow"),
        # 40 rotary dims: halves of 20 are whole vectors of 4, and not of 8.
        ({"rope": rope(40)}, "rope_rotate_bf16_half_narrow"),
        ({"rope": rope(40), "dtype": 0}, "rope_rotate_f32_half_wide"),
        ({"rope": rope(40, True)}, "rope_rotate_bf16_interleaved_narrow"),
        ({"rope": rope(48, True)}, "rope_rotate_bf16_interleaved_wide"),
        ({"rope": rope(0, cos=0)}, "rope_rotate_bf16_half_wide"),
        (
            {"x_layout": cuda_params.RowLayout(64, 516, 0, 128, 1)},
            "rope_rotate_bf16_half_narrow",
        ),
        (
            {"out_layout": cuda_params.RowLayout(64, 512, 516, 128, 16)},
            "rope_rotate_bf16_half_narrow",
        ),
        (
            {"x_layout": cuda_params.RowLayout(64, 512, 0, 129, 1)},
            "rope_rotate_bf16_half_narrow",
        ),
    ],
)
def test_wide_accesses_only_where_everything_is_aligned(changes, kernel):
    assert kernel_of(rope_rotate(**changes)) == kernel
