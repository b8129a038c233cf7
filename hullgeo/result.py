"""What every computation returns: an answer, a certificate, and a status.

Results are `NamedTuple`s, hence pytrees: they pass through `jit`, `vmap`, `scan` and `pmap`
unchanged. A status is an int32 array of the batch's shape, so that one failing row never hides the
others; `raise_if_failed` turns it into an exception on the host.
"""

import enum
from typing import Any, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

ResultT = TypeVar("ResultT", bound=tuple)


class _Code(enum.IntEnum):
    """An integer that carries a sentence for people."""

    message: str

    def __new__(cls, value: int, message: str) -> "_Code":
        code = int.__new__(cls, value)
        code._value_ = value
        code.message = message
        return code


class Status(_Code):
    """How a computation ended; every member carries its `message`.

    Zero is success. Whatever the status, a returned bracket is true: a failure says that less was
    proved than was asked for, never that something false is claimed.
    """

    CONVERGED = 0, "The requested tolerance was reached."
    STEP_LIMIT = 1, "The step limit was reached before the tolerance; raise max_steps."
    CAPACITY = 2, "The support outgrew its slots before the tolerance was reached; raise capacity."
    PRECISION_LIMIT = (
        3,
        "The arithmetic cannot prove the requested tolerance; loosen rtol or atol, or use float64.",
    )
    NONFINITE = 4, "The input holds NaN or infinity, or its scale overflows."
    INFEASIBLE = 5, "The constraints were proved to have no solution."
    NO_CROSSING = 6, "Both ends have the same class, so no crossing is bracketed."
    STALLED = 7, "No further progress was possible from here; try another start."
    NO_GRADIENT = 8, "The gradient vanishes here, so there is no direction to follow."


class Membership(_Code):
    """Whether a query lies in a convex hull, as far as it is proved."""

    OUTSIDE = -1, "A separating hyperplane is proved."
    UNDECIDED = 0, "Neither inside nor outside is proved at the precision used."
    INSIDE = 1, "A ball around the query is proved to lie in the hull, or the distance is <= atol."


class Domain(_Code):
    """In which set of features a problem of the head was solved."""

    SPACE = 0, "All of R^d."
    ORTHANT = 1, "Nonnegative features, as after a ReLU."
    BOX = 2, "Features between the bounds passed."
    HULL = 3, "The convex hull of the points passed."


class Proof(_Code):
    """How the classes along a line are known."""

    SAMPLED = 0, "At samples only: between two of them anything may happen."
    UP_TO_ROUNDING = (
        1,
        "At every position, if rounding changes no margin by more than the stated slack.",
    )
    RIGOROUS = 2, "At every position, rounding included: the slack is a proved bound."


class Evidence(_Code):
    """How it was decided whether two cells share a facet: 1 to 5 that they do, above that not."""

    UNDECIDED = 0, "Neither a common facet nor its absence is proved."
    MIDPOINT = 1, "A witness: the plane's point nearest to the middle of two points of the cells."
    BOUNDARY_POINT = 2, "A witness: the plane's point nearest to a point of one of the cells."
    SEGMENT = 3, "A witness: where a segment between two given features changes class."
    RELAXATION = 4, "A witness, moved along the plane away from the other cells."
    PROGRAM = 5, "A witness from a linear program."
    FARKAS = 6, "No common point: multipliers of Farkas' lemma, checked."
    EMPTY_CELL = 7, "One of the cells is proved to be empty."
    SAME_COLUMN = 8, "The kernel columns are equal, so that no plane lies between the classes."


class Partition(NamedTuple):
    """The cells of a linear head in a domain, and which of them share a facet.

    Guarantee: what is True in `nonempty`, `bounded` and `facet` is proved, rounding included. False
    is proved too wherever the status is `CONVERGED`.

    Attributes:
      nonempty: whether the cell has points in the domain, `(classes,)`.
      bounded: whether the cell (within the domain) is bounded; an empty cell is.
      center: centre of the largest ball in cell and domain, `(classes, dim)`; NaN where there is
        none. In a hull the ball need not lie in the hull, only its centre. Where balls of any size
        fit, the centre of one of them.
      radius: radius of a ball around `center` proved to fit, the largest up to the tolerance of the
        linear program; infinite where balls of any size fit, 0 for an empty cell.
      facet: whether two cells share a facet, `(classes, classes)`, symmetric.
      witness: a point in the facet's relative interior up to rounding, `(classes, classes, dim)`;
        NaN where there is none.
      margin: how far the witness is at least from every other cell, and from the sides of a box.
      evidence: an `Evidence` per pair.
      cell_status: a `Status` per class, `PRECISION_LIMIT` where it is undecided whether the cell is
        empty or bounded.
      status: a `Status` per pair, `PRECISION_LIMIT` where it is undecided.
      domain: the `Domain`, a scalar.
      absent: pairs without a common facet by Farkas' lemma, `(proofs, 2)`; a class twice where its
        cell is empty.
      absent_classes: classes with a multiplier in each of these proofs, `(proofs, terms)`.
      absent_multipliers: the multipliers, for the conditions `(z_i - z_c) / |k_i - k_c| <= 0`
        against the pair's first class c (`= 0` for the second); padded with 0.
    """

    nonempty: Bool[Array, " classes"]
    bounded: Bool[Array, " classes"]
    center: Float[Array, "classes dim"]
    radius: Float[Array, " classes"]
    facet: Bool[Array, "classes classes"]
    witness: Float[Array, "classes classes dim"]
    margin: Float[Array, "classes classes"]
    evidence: Int[Array, "classes classes"]
    cell_status: Int[Array, " classes"]
    status: Int[Array, "classes classes"]
    domain: Int[Array, ""]
    absent: Int[Array, "proofs 2"]
    absent_classes: Int[Array, "proofs terms"]
    absent_multipliers: Float[Array, "proofs terms"]

    @property
    def counts(self) -> dict[str, int]:
        """Number of pairs of classes decided by each kind of evidence."""
        pairs = np.asarray(self.evidence)[np.triu_indices(len(self.nonempty), 1)]
        return {kind.name.lower(): int(np.sum(pairs == kind)) for kind in Evidence}


class HullProjection(NamedTuple):
    """The nearest point of a convex hull to each query, with a two-sided certificate.

    Guarantee: the true distance of the stored numbers lies in
    [`distance_lower_bound`, `distance`], rounding included, whatever the `status`. The query is
    outside the hull wherever `distance_lower_bound > 0` and inside wherever
    `interior_radius > 0` (then `distance` is exactly 0).

    Attributes:
      point: nearest point found, `weights @ vertices[support]`, `(*batch, dim)`.
      distance: Euclidean distance, an upper bound of the true one, in the units of the vertices.
      distance_lower_bound: a proved lower bound of the true distance, same units.
      interior_radius: radius of a ball around the query proved to lie in the hull, else 0.
      support: indices of vertices, `(*batch, slots)`; unused slots repeat an index with weight 0.
      weights: barycentric coordinates on the support, nonnegative, summing to 1.
      gap: Frank-Wolfe gap of the returned weights, `max_v <point - query, point - v>`, squared
        units.
      num_steps: passes over all vertices.
      status: a `Status` per query.
      query: the query, kept so that the separating hyperplane can be read off.
    """

    point: Float[Array, "*batch dim"]
    distance: Float[Array, "*batch"]
    distance_lower_bound: Float[Array, "*batch"]
    interior_radius: Float[Array, "*batch"]
    support: Int[Array, "*batch slots"]
    weights: Float[Array, "*batch slots"]
    gap: Float[Array, "*batch"]
    num_steps: Int[Array, "*batch"]
    status: Int[Array, "*batch"]
    query: Float[Array, "*batch dim"]

    @property
    def normal(self) -> Float[Array, "*batch dim"]:
        """Direction of length one from the hull to the query, as exact as the type; 0 inside."""
        step = self.query - self.point
        largest = jnp.max(jnp.abs(step), axis=-1, keepdims=True)
        scaled = step / jnp.where(largest > 0, largest, 1)
        size = jnp.sqrt(jnp.sum(scaled**2, axis=-1, keepdims=True))
        return scaled / jnp.where(size > 0, size, 1)

    @property
    def offset(self) -> Float[Array, "*batch"]:
        """`<normal, x> = offset` lies midway: it separates query and hull if `gap < distance**2/2`.

        Up to rounding, and only where `distance_lower_bound > 0`.
        """
        return jnp.sum(self.normal * (self.query + self.point) / 2, axis=-1)


class NearestHull(NamedTuple):
    """Which of several hulls is nearest to each query.

    Attributes:
      label: class of the least distance, `(*batch,)`.
      rival: the class that may come closest to it.
      distance: upper bound of the distance to the hull of `label`, in the units of the vertices.
      margin: by how much all other hulls are farther, at least; proves `label` where positive.
      status: a `Status` per query.
    """

    label: Int[Array, "*batch"]
    rival: Int[Array, "*batch"]
    distance: Float[Array, "*batch"]
    margin: Float[Array, "*batch"]
    status: Int[Array, "*batch"]


class HullGuarantee(NamedTuple):
    """How far the hull of each class' features is from each boundary of the head.

    Guarantee: every point of the hull of class c has `z_c - z_j >= margin[c, j]`, rounding
    included; where `certain[c]`, all of the hull is classified c.

    Attributes:
      margin: least `z_c - z_j` over the hull of class c, `(classes, classes)`; infinite on the
        diagonal and for classes without vertices.
      distance: distance from the hull to the plane between c and j, `margin / |k_c - k_j|`, 0 where
        the hull may reach it; infinite where the classes can never change places.
      vertex: index of the vertex with the least margin.
      certain: whether all margins of the class are positive, `(classes,)`.
      num_vertices: vertices of each class.
      status: a `Status` per class, `INFEASIBLE` for an empty hull.
    """

    margin: Float[Array, "classes classes"]
    distance: Float[Array, "classes classes"]
    vertex: Int[Array, "classes classes"]
    certain: Bool[Array, " classes"]
    num_vertices: Int[Array, " classes"]
    status: Int[Array, " classes"]


class RegionMembership(NamedTuple):
    """Whether queries lie in the regions that given features certify for their class.

    Attributes:
      label: class of the query by the head; no other class' region can hold it.
      ball: `Membership` in the union of the balls around the features of that class, each as large
        as its distance to the nearest boundary.
      hull: `Membership` in the hull of these features.
      joined: `Membership` in the hull of these balls, which holds both of the above.
      distance: upper bound of the distance to the joined region, 0 inside.
      distance_lower_bound: proved lower bound of it.
      status: `CONVERGED` where all three are decided, `INFEASIBLE` for a class without features
        (every verdict is `OUTSIDE`), `NONFINITE`, else `PRECISION_LIMIT` or `STEP_LIMIT`.
    """

    label: Int[Array, "*batch"]
    ball: Int[Array, "*batch"]
    hull: Int[Array, "*batch"]
    joined: Int[Array, "*batch"]
    distance: Float[Array, "*batch"]
    distance_lower_bound: Float[Array, "*batch"]
    status: Int[Array, "*batch"]

    @property
    def coverage(self) -> dict[str, float]:
        """Share of the queries proved to lie in each kind of region."""
        kinds = {"ball": self.ball, "hull": self.hull, "joined": self.joined}
        return {
            name: float(np.mean(np.asarray(verdict) == Membership.INSIDE))
            for name, verdict in kinds.items()
        }


class HullPair(NamedTuple):
    """The nearest points of two convex hulls, with a two-sided certificate.

    Guarantee: the true distance of the hulls of the stored numbers lies in
    [`distance_lower_bound`, `distance`], rounding included, whatever the `status`. The hulls are
    apart wherever `distance_lower_bound > 0`, and meet wherever `overlap > 0` (then `distance` is
    exactly 0).

    Attributes:
      point_a: nearest point found in the first hull, `(dim,)`.
      point_b: nearest point found in the second hull.
      distance: upper bound of the distance, in the units of the vertices.
      distance_lower_bound: a proved lower bound, same units.
      overlap: the hulls are proved to meet after any translation shorter than this; else 0.
      normal: direction of length one from the second hull to the first, `(dim,)`.
      offset: where `distance_lower_bound > 0`, the hyperplane `<normal, x> = offset` separates the
        hulls, midway between them.
      gap: computed Frank-Wolfe gap of the weights behind the points, squared units.
      num_steps: passes over all vertices.
      status: a `Status`.
    """

    point_a: Float[Array, " dim"]
    point_b: Float[Array, " dim"]
    distance: Float[Array, ""]
    distance_lower_bound: Float[Array, ""]
    overlap: Float[Array, ""]
    normal: Float[Array, " dim"]
    offset: Float[Array, ""]
    gap: Float[Array, ""]
    num_steps: Int[Array, ""]
    status: Int[Array, ""]


class HullDiameter(NamedTuple):
    """The largest distance between two points of a hull, which two of its vertices have.

    Attributes:
      diameter: an upper bound, rounding included.
      diameter_lower_bound: a lower bound, the distance of `pair`.
      pair: indices of two vertices that far apart, `(2,)`.
      status: a `Status`.
    """

    diameter: Float[Array, ""]
    diameter_lower_bound: Float[Array, ""]
    pair: Int[Array, "2"]
    status: Int[Array, ""]


class ExtremePoints(NamedTuple):
    """Which of given points are extreme points (vertices in the strict sense) of their hull.

    Attributes:
      extreme: whether a point is proved to be extreme; copies of one point share the verdict.
      direction: of length one: the extreme point is farther in it than all points that are not its
        copies, `(vertices, dim)`; NaN for others.
      margin: by how much, rounding included; for a point that is proved not to be extreme, minus
        the radius of a ball around it proved to lie in the hull of others.
      status: `CONVERGED` where it is proved that the point is extreme or that it is not,
        `PRECISION_LIMIT` where it lies on a face up to rounding.
    """

    extreme: Bool[Array, " vertices"]
    direction: Float[Array, "vertices dim"]
    margin: Float[Array, " vertices"]
    status: Int[Array, " vertices"]


class BoundaryDistance(NamedTuple):
    """Distance of features to the nearest decision boundary of a linear head.

    Attributes:
      distance: Euclidean distance, the radius of the largest open ball around the feature with one
        class; 0 on a boundary, infinite where no other class can take over.
      label: class of the feature, `(*batch,)`; the smallest index among ties.
      rival: the class on the other side of the nearest boundary.
      status: a `Status` per feature.
    """

    distance: Float[Array, "*batch"]
    label: Int[Array, "*batch"]
    rival: Int[Array, "*batch"]
    status: Int[Array, "*batch"]


class BoundaryPoint(NamedTuple):
    """The nearest points of a domain at which classes tie, with a two-sided certificate.

    Guarantee: the true distance from the query to the points of the domain that meet the condition
    lies in [`distance_lower_bound`, `distance`], rounding included, whatever the `status`. Where
    such points are proved not to exist both are infinite and the status is `INFEASIBLE`; where
    neither existence nor absence is proved, `distance` is infinite, `distance_lower_bound` is
    finite and the status is `PRECISION_LIMIT`.

    Attributes:
      point: nearest point found, `(*batch, dim)`, rounded to the type of the features; NaN where
        there is none.
      distance: Euclidean distance, an upper bound of the true one, in the units of the features.
      distance_lower_bound: a proved lower bound of the true distance, same units.
      label: class of the query; the smallest index among ties.
      rival: the class met at the point (of a tie of several classes, the smallest index that is
        not the label); the label itself where no other class is met.
      multipliers: one per class, `(*batch, num_classes)`, summing to 0: the point is the
        projection of `query + kernel @ multipliers` onto the domain.
      kkt_residual: how far the point is from meeting the optimality conditions (ties, classes
        that exceed the tie, projection), as a distance in the units of the features.
      domain: the `Domain` in which the problem was solved.
      status: a `Status` per query.
    """

    point: Float[Array, "*batch dim"]
    distance: Float[Array, "*batch"]
    distance_lower_bound: Float[Array, "*batch"]
    label: Int[Array, "*batch"]
    rival: Int[Array, "*batch"]
    multipliers: Float[Array, "*batch num_classes"]
    kkt_residual: Float[Array, "*batch"]
    domain: Int[Array, "*batch"]
    status: Int[Array, "*batch"]


class TieMap(NamedTuple):
    """Which sets of classes tie somewhere in a domain, and where.

    Attributes:
      classes: one row a set, `(sets, num_classes)`, by size, then in lexicographic order.
      size: number of classes in each set.
      tie: the nearest tie of each set, a `BoundaryPoint` with the sets as batch.
      status: `CONVERGED` where the set ties, `INFEASIBLE` where it is proved not to; anything else
        is undecided.
    """

    classes: Bool[Array, "sets num_classes"]
    size: Int[Array, " sets"]
    tie: BoundaryPoint
    status: Int[Array, " sets"]


class SegmentClasses(NamedTuple):
    """The classes along segments in feature space, exactly.

    Attributes:
      position: crossings in [0, 1], ascending, `(*batch, num_classes - 1)`.
      classes: classes between the crossings, `(*batch, num_classes)`.
      num_crossings: how many entries of `position` count; later ones repeat the last.
      status: a `Status` per segment.
    """

    position: Float[Array, "*batch crossings"]
    classes: Int[Array, "*batch pieces"]
    num_crossings: Int[Array, "*batch"]
    status: Int[Array, "*batch"]


class Crossing(NamedTuple):
    """A bracket around one change of class along a segment.

    Guarantee: the classes at `lower` and `upper`, evaluated by the caller's own function, are
    `class_lower` and `class_upper`, and differ wherever the status is not `NO_CROSSING` or
    `NONFINITE`.

    Attributes:
      lower: position in [0, 1] on the near side.
      upper: position in [0, 1] on the far side, `upper > lower`.
      class_lower: class at `lower`.
      class_upper: class at `upper`.
      num_evaluations: evaluations of the logits, the two ends included.
      status: a `Status` per segment.
    """

    lower: Float[Array, "*batch"]
    upper: Float[Array, "*batch"]
    class_lower: Int[Array, "*batch"]
    class_upper: Int[Array, "*batch"]
    num_evaluations: Int[Array, "*batch"]
    status: Int[Array, "*batch"]


class SegmentTrace(NamedTuple):
    """The classes along segments of images, and how they are known.

    Guarantee: with `proof` UP_TO_ROUNDING or RIGOROUS and status CONVERGED, the classes at all
    positions outside the intervals (`lower`, `upper`) are those stated, and each holds one change,
    for the network in real arithmetic with the parameters as stored. With SAMPLED, the classes at
    `lower` and `upper` are those of the caller's function, and between samples nothing is claimed.

    Attributes:
      lower: position in [0, 1] up to which the class before each crossing holds, ascending,
        `(*batch, crossings)`; entries past `num_crossings` repeat the last, or are 1.
      upper: position from which the class after it holds.
      slope: derivative at the crossing of the logit of the class after minus that of the class
        before, per length of the segment.
      classes: classes between the crossings, `(*batch, crossings + 1)`; later ones repeat the last.
      margin: smallest local minimum of the margin (largest minus second largest logit) inside each
        class: how near the segment comes to another class without entering it; infinite where the
        margin only rises and falls once. Of the samples, where these are all that is known.
      num_crossings: how many crossings count.
      num_pieces: linear pieces of the network along the segment; 0 if sampled.
      slack: how much rounding may change a margin for the proof to hold; infinite if sampled.
      proof: a `Proof` per segment.
      num_evaluations: evaluations of the logits: samples, or rows of a proof.
      status: a `Status` per segment.
    """

    lower: Float[Array, "*batch crossings"]
    upper: Float[Array, "*batch crossings"]
    slope: Float[Array, "*batch crossings"]
    classes: Int[Array, "*batch pieces"]
    margin: Float[Array, "*batch pieces"]
    num_crossings: Int[Array, "*batch"]
    num_pieces: Int[Array, "*batch"]
    slack: Float[Array, "*batch"]
    proof: Int[Array, "*batch"]
    num_evaluations: Int[Array, "*batch"]
    status: Int[Array, "*batch"]


class SegmentPath(NamedTuple):
    """A piecewise-linear function along one segment: all its knots.

    Attributes:
      position: knots in [0, 1], ascending, 0 and 1 included, `(knots,)`.
      value: the function there, `(knots, dim)`; affine between neighbours.
      slack: how much rounding may change a difference of two values.
      proof: a `Proof`.
      status: a `Status`.
    """

    position: Float[Array, "knots"]
    value: Float[Array, "knots dim"]
    slack: Float[Array, ""]
    proof: Int[Array, ""]
    status: Int[Array, ""]


class PlaneCells(NamedTuple):
    """The exact class cells of a linear head on a plane through feature space.

    Attributes:
      origin: a point of the plane, `(dim,)`.
      axes: two orthonormal directions, `(2, dim)`.
      corners: coordinates of the three points passed, `(3, 2)`.
      view: lower and upper corner of the square shown, `(2, 2)`.
      vertices: vertices of all polygons, counter-clockwise, one polygon after the other, `(m, 2)`.
      starts: index of each polygon's first vertex, and, last, m, `(polygons + 1,)`.
      classes: class of each polygon, `(polygons,)`.
    """

    origin: Float[np.ndarray, "dim"]
    axes: Float[np.ndarray, "2 dim"]
    corners: Float[np.ndarray, "3 2"]
    view: Float[np.ndarray, "2 2"]
    vertices: Float[np.ndarray, "vertices 2"]
    starts: Int[np.ndarray, "ends"]
    classes: Int[np.ndarray, "polygons"]


class PlaneClasses(NamedTuple):
    """The classes on a plane through three images, on a grid refined along the boundaries.

    Attributes:
      origin: a point of the plane, an image.
      axes: two orthonormal directions, `(2, *image)`.
      corners: coordinates of the three images passed, `(3, 2)`, in units of pixel values.
      view: lower and upper corner of the square shown, `(2, 2)`.
      classes: class at each point of the grid, `(rows, columns)`; rows follow the second axis
        upwards. Between evaluated points that agree it is theirs.
      evaluated: where the network was evaluated.
      num_evaluations: how often.
      status: a `Status` of the whole picture.
    """

    origin: Float[np.ndarray, "..."]
    axes: Float[np.ndarray, "2 ..."]
    corners: Float[np.ndarray, "3 2"]
    view: Float[np.ndarray, "2 2"]
    classes: Int[np.ndarray, "rows columns"]
    evaluated: Bool[np.ndarray, "rows columns"]
    num_evaluations: Int[np.ndarray, ""]
    status: Int[np.ndarray, ""]


class Inversion(NamedTuple):
    """Images whose features were moved to a target.

    Attributes:
      image: image within the bounds, `(*batch, height, width, channels)`.
      features: features of `image`, `(*batch, dim)`.
      residual: `|features - target| / |target|`.
      pixel_distance: Euclidean distance to the starting image.
      active: share of pixel values exactly at a bound.
      stationarity: norm of the gradient of `|phi - t|^2 / 2` on the pixels free to follow it,
        relative to `|J| |phi - t|`; NaN where the target is reached or no Jacobian was computed.
      num_blocked: features of `image` that are positive although the target asks for exactly 0.
      num_dead: features of `image` that are exactly 0 although the target is positive. After a ReLU
        they have no gradient: a target with the same zeros as the start can be reached more often.
      num_gradients: gradients (or vector-Jacobian products) spent per image.
      status: a `Status` per image: `CONVERGED` where the residual is at most rtol; `NO_GRADIENT`
        where the features cannot move nearer to the target from here (`stationarity` is the
        evidence); `STALLED` where no step helped; `STEP_LIMIT`; `NONFINITE`.
    """

    image: Float[Array, "*batch height width channels"]
    features: Float[Array, "*batch dim"]
    residual: Float[Array, "*batch"]
    pixel_distance: Float[Array, "*batch"]
    active: Float[Array, "*batch"]
    stationarity: Float[Array, "*batch"]
    num_blocked: Int[Array, "*batch"]
    num_dead: Int[Array, "*batch"]
    num_gradients: Int[Array, "*batch"]
    status: Int[Array, "*batch"]


class Flip(NamedTuple):
    """The nearest image found at which the class changes, bracketed along its ray.

    Guarantee: `image` and `image_before` lie within the bounds to the bit. Wherever the status is
    `CONVERGED`, `image` has changed class and `image_before`, a little nearer to the start on the
    same ray, has not, both by more than the rounding of the network, evaluated in this batch and
    alone. `distance` is therefore an upper bound of the distance to the boundary; no lower bound
    is claimed.

    Attributes:
      image: the flipped image, `(*batch, *image)`.
      distance: Euclidean distance from the image asked about to `image`; infinite where no flip
        was found.
      image_before: the near side of the bracket.
      distance_before: its distance.
      label: the class that is left (the given label, or the class at the start).
      rival: the class at `image`; `label` where no flip was found.
      tie_gap: how far the class has changed at `image`: the rival's logit minus the label's (with
        a target: minus the largest other logit).
      kkt_residual: relative distance of the displacement from the one that the gradient of
        `tie_gap` explains, `|d - clip(l g)| / |d|` at the best `l`; 0 at a smooth closest point,
        the sine of the angle between d and g where no pixel is at a bound.
      num_gradients: gradients spent per image.
      num_evaluations: forward evaluations spent per image, those for gradients not counted.
      status: a `Status` per image: `CONVERGED`; `PRECISION_LIMIT` where the rounding of the network
        hides the change of class; `NO_GRADIENT` where every gradient seen was zero; `STALLED` where
        no flip was found.
    """

    image: Float[Array, "*batch height width channels"]
    distance: Float[Array, "*batch"]
    image_before: Float[Array, "*batch height width channels"]
    distance_before: Float[Array, "*batch"]
    label: Int[Array, "*batch"]
    rival: Int[Array, "*batch"]
    tie_gap: Float[Array, "*batch"]
    kkt_residual: Float[Array, "*batch"]
    num_gradients: Int[Array, "*batch"]
    num_evaluations: Int[Array, "*batch"]
    status: Int[Array, "*batch"]


class Morph(NamedTuple):
    """Images from one to another, and what the network makes of each.

    Attributes:
      images: `(*batch, num_frames, *image)`, within the bounds.
      features: `(*batch, num_frames, dim)`.
      targets: points of the path in feature space, likewise.
      residual: `|features - targets| / |targets|`, `(*batch, num_frames)`; how far a pixel blend
        leaves the segment between the features, or how well a frame was inverted.
      labels: class of each frame.
      margin: largest logit minus the second.
      crossings: a `Crossing` between each frame and the next, `(*batch, num_frames - 1)`; its
        status is `NO_CROSSING` where both have the same class.
      num_gradients: vector-Jacobian products spent per frame.
      status: a `Status` per frame: `STEP_LIMIT` where the target was not reached.
    """

    images: Float[Array, "*batch frames height width channels"]
    features: Float[Array, "*batch frames dim"]
    targets: Float[Array, "*batch frames dim"]
    residual: Float[Array, "*batch frames"]
    labels: Int[Array, "*batch frames"]
    margin: Float[Array, "*batch frames"]
    crossings: Crossing
    num_gradients: Int[Array, "*batch frames"]
    status: Int[Array, "*batch frames"]


class AmbiguousImage(NamedTuple):
    """Images at which chosen classes tie.

    Attributes:
      image: image within the bounds, `(*batch, *image)`.
      distance: Euclidean distance from the image asked about, an upper bound of the distance to
        the nearest such image where the status is `CONVERGED`.
      logits: logits of `image`, `(*batch, num_classes)`.
      tie_gap: largest minus smallest logit among the chosen classes.
      residual: norm of the differences of the chosen logits together with the excess of the others
        over their mean; at most atol where the status is `CONVERGED`.
      num_gradients: vector-Jacobian products spent per image.
      status: a `Status` per image.
    """

    image: Float[Array, "*batch height width channels"]
    distance: Float[Array, "*batch"]
    logits: Float[Array, "*batch num_classes"]
    tie_gap: Float[Array, "*batch"]
    residual: Float[Array, "*batch"]
    num_gradients: Int[Array, "*batch"]
    status: Int[Array, "*batch"]


def failed(result: Any) -> Bool[Array, "*batch"]:
    """Where a result's status is not `Status.CONVERGED`; works on traced values, too.

    Args:
      result: any hullgeo result with a `status`.

    Returns:
      booleans of the status's shape.
    """
    return jnp.asarray(result.status) != Status.CONVERGED


def raise_if_failed(result: ResultT) -> ResultT:
    """Return the result unchanged, or raise if any of its rows failed. Host side only.

    Args:
      result: any hullgeo result with a `status`.

    Returns:
      the same result, whose rows have all `CONVERGED`.

    Raises:
      RuntimeError: naming the first failing rows, how many failed, and each status' message.
      TypeError: inside a traced function, where a status has no value yet; or for something that
        has no status.
    """
    status = getattr(result, "status", None)
    if status is None:
        raise TypeError(f"Expected result to have a status, got a {type(result).__name__}.")
    if isinstance(status, Tracer):
        raise TypeError(
            "raise_if_failed needs concrete values: call it outside jit, or use result.status."
        )
    status = np.asarray(status)
    if not status.any():
        return result
    lines = []
    for code in np.unique(status[status != Status.CONVERGED]):
        rows = [
            int(row[0]) if status.ndim == 1 else tuple(map(int, row))
            for row in np.argwhere(status == code)
        ]
        shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        where = f" (rows {shown})" if status.ndim else ""
        name, message = _describe(int(code))
        lines.append(f"{name} in {len(rows)} of {status.size}{where}: {message}")
    raise RuntimeError(f"{type(result).__name__} failed. " + " ".join(lines))


def _describe(code: int) -> tuple[str, str]:
    try:
        return Status(code).name, Status(code).message
    except ValueError:
        return f"status {code}", "This number is no Status."
