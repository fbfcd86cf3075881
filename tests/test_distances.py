"""Distances with known values, against scipy and against plain loops."""

import itertools
import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm
from scipy.stats import entropy

from ssmttm.errors import UserError
from ssmttm.evaluation import frechet_distance, kernel_distance
from ssmttm.evaluation.metrics import kernel, prdc
from ssmttm.evaluation.metrics.bootstrap import bootstrap, mean_interval
from ssmttm.evaluation.metrics.clap_score import clap_score
from ssmttm.evaluation.metrics.compute import set_distances
from ssmttm.evaluation.metrics.frechet import frechet_distance_infinity, frechet_statistic
from ssmttm.evaluation.metrics.kernel import kernel_statistic, median_distance
from ssmttm.evaluation.metrics.kl import kl_divergence
from ssmttm.evaluation.metrics.mauve import mauve, mauve_divergence, mauve_statistic
from ssmttm.evaluation.metrics.prdc import PrecisionRecallCoverage, prdc_statistic, precision_recall_coverage
from ssmttm.evaluation.protocol.embed_files import ClipEmbeddings


def cloud(n, d, seed=0, shift=0.0, scale=1.0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, d)) * scale + shift)


def frechet_by_scipy(x, y):
    cx, cy = np.cov(x.T), np.cov(y.T)
    root = sqrtm(cx @ cy)
    return np.square(x.mean(0) - y.mean(0)).sum() + np.trace(cx + cy - 2 * root.real)


@given(st.integers(20, 80), st.integers(20, 80), st.integers(2, 12), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_frechet_distance_equals_scipy(n, m, d, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, d)) @ rng.standard_normal((d, d))
    y = rng.standard_normal((m, d)) @ rng.standard_normal((d, d)) + rng.standard_normal(d)
    assert frechet_distance(x, y) == pytest.approx(frechet_by_scipy(x, y), rel=1e-6, abs=1e-6)
    assert frechet_distance(x, y) == pytest.approx(frechet_distance(y, x), rel=1e-9, abs=1e-9)


def test_frechet_distance_of_known_gaussians():
    """Whitened samples have exactly the mean and covariance that are imposed."""
    raw = cloud(500, 6).numpy()
    white = (raw - raw.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(raw.T))).T
    a, b = np.arange(1.0, 7.0), np.arange(6.0, 0.0, -1.0)
    shift = np.full(6, 0.5)
    expected = 6 * 0.25 + np.square(a - b).sum()
    assert frechet_distance(white * a, white * b + shift) == pytest.approx(expected, rel=1e-9)
    rotation = np.linalg.qr(np.random.default_rng(1).standard_normal((6, 6)))[0]
    assert frechet_distance(white * a @ rotation, (white * b + shift) @ rotation) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", [(300, 5), (10, 40), (2, 3)])
def test_frechet_distance_of_set_to_itself_is_zero(shape):
    x = cloud(*shape)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-7)
    assert frechet_distance(x, x + 1) == pytest.approx(shape[1], rel=1e-6)


def test_frechet_distance_of_fewer_samples_than_dimensions():
    x, y = cloud(12, 40), cloud(15, 40, seed=1)
    assert frechet_distance(x, y) == pytest.approx(frechet_by_scipy(x.numpy(), y.numpy()), rel=1e-5)


def test_frechet_distance_of_constant_embeddings():
    x, y = torch.ones(5, 3), torch.full((6, 3), 3.0)
    assert frechet_distance(x, y) == pytest.approx(12)
    assert frechet_distance(x, cloud(500, 3, shift=1.0)) == pytest.approx(3, rel=0.2)


def test_frechet_distance_infinity_removes_bias_of_few_samples():
    """x and y are samples of one Gaussian: the true distance is 0."""
    y = cloud(20_000, 16, seed=9)
    few, many = frechet_distance(cloud(200, 16, seed=1), y), frechet_distance(cloud(2_000, 16, seed=1), y)
    infinity = frechet_distance_infinity(cloud(2_000, 16, seed=1), y)
    assert few > 5 * many > 0 and abs(infinity.value) < 0.3 * many
    assert infinity.low < infinity.value < infinity.high and infinity.high - infinity.low < many
    assert infinity == frechet_distance_infinity(cloud(2_000, 16, seed=1), y)
    assert infinity != frechet_distance_infinity(cloud(2_000, 16, seed=1), y, seed=1)


def test_frechet_distance_infinity_of_equal_sets_is_negative_and_says_so(caplog):
    x = cloud(100, 64, scale=2.0)
    with caplog.at_level(logging.WARNING):
        infinity = frechet_distance_infinity(x, x)
    assert infinity.value < -5 and "never negative" in caplog.text and "overshoots" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert frechet_distance_infinity(x + 2, x).value > 0
    assert "never negative" not in caplog.text


def kernel_by_loops(x, y):
    reference = [math.dist(a, b) for i, a in enumerate(y) for b in y[:i]]
    reference.sort()
    bandwidth = reference[(len(reference) - 1) // 2]

    def k(a, b):
        return math.exp(-(math.dist(a, b) ** 2) / (2 * bandwidth**2))

    def mean(pairs):
        values = [k(a, b) for a, b in pairs]
        return sum(values) / len(values)

    xx = mean([(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    yy = mean([(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    return 100 * (xx + yy - 2 * mean([(a, b) for a in x for b in y]))


@given(st.integers(2, 14), st.integers(3, 14), st.integers(1, 5), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_kernel_distance_equals_plain_loops(n, m, d, seed):
    x, y = cloud(n, d, seed), cloud(m, d, seed + 1, shift=0.7)
    assert kernel_distance(x, y) == pytest.approx(kernel_by_loops(x.tolist(), y.tolist()), rel=1e-9, abs=1e-9)


def test_kernel_distance_is_unbiased_and_computed_in_blocks():
    x, y = cloud(2_500, 8), cloud(3_000, 8, seed=1)
    values = [kernel_distance(cloud(100, 8, seed=s), cloud(100, 8, seed=s + 500)) for s in range(40)]
    assert abs(kernel_distance(x, y)) < 0.05 and abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(40)
    assert kernel_distance(x + 0.3, y) > 1
    assert kernel_distance(torch.ones(4, 3), torch.ones(5, 3)) == pytest.approx(0)


def prdc_by_loops(x, y, k):
    def radius(points, i):
        return sorted(math.dist(points[i], p) for j, p in enumerate(points) if j != i)[k - 1]

    rx, ry = [radius(x, i) for i in range(len(x))], [radius(y, i) for i in range(len(y))]
    precision = np.mean([any(math.dist(a, b) <= r for b, r in zip(y, ry, strict=True)) for a in x])
    recall = np.mean([any(math.dist(a, b) <= r for a, r in zip(x, rx, strict=True)) for b in y])
    coverage = np.mean([any(math.dist(a, b) <= r for a in x) for b, r in zip(y, ry, strict=True)])
    return precision, recall, coverage


def test_precision_recall_coverage_equals_plain_loops():
    x, y = cloud(40, 3, shift=0.8), cloud(50, 3, seed=1)
    assert precision_recall_coverage(x, y, 3) == pytest.approx(prdc_by_loops(x.tolist(), y.tolist(), 3))


def test_precision_recall_coverage_of_collapsed_model():
    y = cloud(400, 4)
    found = precision_recall_coverage(y[:1] + cloud(300, 4, seed=1, scale=0.01), y)
    assert found.precision > 0.9 and found.recall < 0.05 and found.coverage < 0.1
    same = precision_recall_coverage(cloud(400, 4, seed=2), y)
    assert min(same) > 0.8


def test_kl_divergence_equals_scipy():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6), 9), rng.dirichlet(np.ones(6), 9)
    found = kl_divergence(generated=q, reference=p)
    assert found.numpy() == pytest.approx(entropy(p, q, axis=1), rel=1e-4)
    assert kl_divergence(p, p).abs().max() < 1e-12
    certain = kl_divergence(np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]]))
    assert float(certain) == pytest.approx(math.log(1e6), rel=1e-3)


def test_clap_score_is_cosine_similarity():
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert clap_score(a, torch.tensor([[6.0, 8.0], [0.0, 2.0]])).tolist() == pytest.approx([1.0, 0.0])
    assert float(clap_score(a[:1], a[1:])) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("distance", "statistic"), [(frechet_distance, frechet_statistic), (kernel_distance, kernel_statistic)]
)
def test_bootstrap_width_is_deviation_over_new_samples(distance, statistic):
    fresh = [distance(cloud(300, 4, s, shift=0.5), cloud(300, 4, s + 500)) for s in range(60)]
    x, y = cloud(300, 4, seed=7, shift=0.5), cloud(300, 4, seed=8)
    of_weights = statistic(x[:, None], y[:, None])
    (found,) = bootstrap(of_weights, 300, 300, draws=200)
    assert found.low < distance(x, y) < found.high and found.value == pytest.approx(distance(x, y))
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(np.std(fresh), rel=0.4)
    assert [found] == bootstrap(of_weights, 300, 300, draws=200)
    assert [found] != bootstrap(of_weights, 300, 300, draws=200, seed=1)


def test_bootstrap_of_one_set_keeps_pairs_together():
    x = cloud(200, 1)[:, 0]
    difference = x - (x - 2)
    (paired,) = bootstrap(lambda weights: [float(weights @ difference / weights.sum())], 200, draws=200)
    assert paired.low == pytest.approx(2) and paired.high == pytest.approx(2)

    def unpaired(weights_x, weights_y):
        return [float(weights_x @ x / weights_x.sum() - weights_y @ (x - 2) / weights_y.sum())]

    (interval,) = bootstrap(unpaired, 200, 200, draws=200)
    assert interval.high - interval.low > 0.2


def test_mean_interval_equals_plain_percentile_bootstrap():
    values = np.random.default_rng(3).exponential(size=40)
    rng = np.random.default_rng(0)
    means = values[rng.integers(40, size=(1_000, 40))].mean(1)
    assert mean_interval(values) == pytest.approx((values.mean(), *np.quantile(means, (0.025, 0.975))))
    assert mean_interval(values[:1]) == (values[0],) * 3


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.ones(1, 3), torch.ones(5, 3), "at least 2"),
        (torch.ones(5, 3), torch.ones(5, 4), "width 3 and 4"),
        (torch.full((5, 3), math.nan), torch.ones(5, 3), "NaN"),
        (torch.ones(5), torch.ones(5, 3), "[n, d]"),
        (torch.ones(0, 3), torch.ones(5, 3), "[n, d]"),
    ],
)
@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance, precision_recall_coverage])
def test_distances_reject_bad_embeddings(distance, x, y, message):
    with pytest.raises(UserError) as caught:
        distance(x, y)
    assert message in str(caught.value)


def test_frechet_distance_warns_of_few_samples(caplog):
    with caplog.at_level(logging.WARNING):
        frechet_distance(cloud(300, 8), cloud(300, 8, seed=1))
        assert not caplog.records
        frechet_distance(cloud(100, 8), cloud(300, 8, seed=1))
        assert "100 samples" in caplog.text
        caplog.clear()
        frechet_distance(cloud(300, 400), cloud(300, 400, seed=1))
        assert "400 dimensions" in caplog.text
    with pytest.raises(UserError, match="20"):
        frechet_distance_infinity(cloud(10, 3), cloud(300, 3))


def test_kl_divergence_and_clap_score_reject_bad_input():
    with pytest.raises(UserError, match="paired"):
        kl_divergence(torch.full((3, 2), 0.5), torch.full((4, 2), 0.5))
    with pytest.raises(UserError, match="softmax"):
        kl_divergence(torch.ones(3, 2), torch.full((3, 2), 0.5))
    with pytest.raises(UserError, match="paired"):
        clap_score(torch.ones(3, 2), torch.ones(4, 2))


@pytest.mark.parametrize(("windows", "near"), [((1, 1), 64), ((3, 2), 64), ((3, 2), 7), ((1, 2), 1)])
def test_bootstrap_of_weights_equals_bootstrap_of_rows(windows, near, monkeypatch):
    """If few neighbours are kept, some draws need the distances of all rows."""
    monkeypatch.setattr(prdc, "_NEAREST", near)
    for module in (prdc, kernel):
        monkeypatch.setattr(module, "BLOCK_ROWS", 20)
    generator = torch.Generator().manual_seed(near)
    x, y = (torch.randn(n, w, 4, generator=generator).double() for n, w in zip((30, 41), windows, strict=True))
    bandwidth = median_distance(y.flatten(0, 1))

    def of_rows(statistic):
        def of_clips(a, b):
            return statistic(a.flatten(0, 1), b.flatten(0, 1))

        generator = torch.Generator().manual_seed(3)
        values = []
        for _ in range(25):
            rows = [torch.randint(len(clips), (len(clips),), generator=generator) for clips in (x, y)]
            values.append(of_clips(x[rows[0]], y[rows[1]]))
        low, high = np.quantile(values - np.mean(values), (0.025, 0.975)) + of_clips(x, y)
        return of_clips(x, y), low, high

    def plain_kernel(a, b):
        k = [torch.cdist(p, q).div(bandwidth).square().div(-2).exp().sum() for p, q in ((a, a), (b, b), (a, b))]
        n, m = len(a), len(b)
        return float(100 * ((k[0] - n) / (n * (n - 1)) + (k[1] - m) / (m * (m - 1)) - 2 * k[2] / (n * m)))

    (fad,) = bootstrap(frechet_statistic(x, y), 30, 41, draws=25, seed=3)
    assert fad == pytest.approx(of_rows(frechet_distance))
    (kad,) = bootstrap(kernel_statistic(x, y), 30, 41, draws=25, seed=3)
    assert kad == pytest.approx(of_rows(plain_kernel))
    assert kad.value == pytest.approx(kernel_distance(x.flatten(0, 1), y.flatten(0, 1)))
    intervals = bootstrap(prdc_statistic(x, y), 30, 41, draws=25, seed=3)
    for interval, name in zip(intervals, PrecisionRecallCoverage._fields, strict=True):
        plain = of_rows(lambda a, b, name=name: getattr(precision_recall_coverage(a, b), name))
        assert interval == pytest.approx(plain), name


def test_set_distances_shows_progress(monkeypatch, capsys):
    for module in (prdc, kernel):
        monkeypatch.setattr(module, "BLOCK_ROWS", 8)
    none = torch.zeros(0)
    set_distances(*(ClipEmbeddings(cloud(30, 8, seed=s).view(30, 2, 4), none, none) for s in (0, 1)))
    shown = capsys.readouterr().err
    for title in ("interval of fad", "interval of kad", "interval of prdc", "kernels", "neighbours", "fad_infinity"):
        assert f"{title}: " in shown


def mauve_by_loops(p, q):
    """Equations 2 and 3 of arXiv 2102.01454, with the area by the trapezoidal rule over both axes."""

    def kl(a, b):
        return sum(ai * math.log(ai / bi) for ai, bi in zip(a, b, strict=True) if ai > 0)

    points = [(1.0, 0.0)]
    for i in range(25):
        weight = 1e-6 + (1 - 2e-6) * i / 24
        mixture = [weight * a + (1 - weight) * b for a, b in zip(p, q, strict=True)]
        points.append((math.exp(-5 * kl(q, mixture)), math.exp(-5 * kl(p, mixture))))
    points.append((0.0, 1.0))

    def area(pairs):
        pairs = sorted(pairs, key=lambda pair: (pair[0], -pair[1]))
        return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(pairs))

    return (area(points) + area([(b, a) for a, b in points])) / 2


@given(st.integers(2, 12), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_mauve_equals_plain_loops(k, seed):
    rng = np.random.default_rng(seed)
    p, q = rng.dirichlet(np.full(k, 0.3)), rng.dirichlet(np.full(k, 0.3))
    p[0] = 0
    p /= p.sum()
    assert mauve(p, q) == pytest.approx(mauve_by_loops(p, q), rel=1e-9)
    assert mauve(p, q) == pytest.approx(mauve(q, p), rel=1e-9) and mauve(q, q) == pytest.approx(1)


def test_mauve_divergence_of_separate_clusters():
    """Four far clusters, which k-means finds: the divergence is that of their proportions."""
    centres = 10 * torch.eye(4).double()

    def draw(counts, seed):
        means = torch.cat([centres[i].expand(n, -1) for i, n in enumerate(counts)])
        return means + cloud(sum(counts), 4, seed=seed, scale=0.01)

    x, y = draw((10, 10, 10, 10), 0), draw((30, 10, 0, 0), 1)
    expected = -math.log(mauve_by_loops([0.25] * 4, [0.75, 0.25, 0, 0]))
    assert mauve_divergence(x, y) == pytest.approx(expected, rel=1e-9)
    assert mauve_divergence(x, draw((10, 10, 10, 10), 2)) == pytest.approx(0, abs=1e-9)
    weights = torch.cat([torch.full((30,), 1 / 3), torch.ones(10)]).double()  # the first cluster counts as 10 rows
    expected = -math.log(mauve_by_loops([0.25] * 4, [0.5, 0.5, 0, 0]))
    assert mauve_statistic(x[:, None], y[:, None])(torch.ones(40).double(), weights)[0] == pytest.approx(expected)


def test_mauve_divergence_equals_package():
    """mauve-text's k-means is faiss's: as near as its own values of two seeds are to each other."""
    package = pytest.importorskip("mauve")
    for shift in (1.0, 3.0):
        x, y = cloud(400, 16).numpy(), cloud(500, 16, seed=1, shift=shift).numpy()
        theirs = [-math.log(package.compute_mauve(x, y, seed=seed).mauve) for seed in range(3)]
        assert mauve_divergence(x, y) == pytest.approx(np.mean(theirs), rel=0.1)
