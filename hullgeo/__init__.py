"""Certified geometry of the feature space of trained image classifiers, in JAX.

After arXiv:2202.04052: a network's last hidden layer is where it separates the classes, and from
there on it is linear. hullgeo studies that feature space for any model, in batches, and every
answer carries a certificate. The README shows the use; `docs/design.md` the layers.
"""

from hullgeo.ambiguous import ambiguous_image as ambiguous_image
from hullgeo.analysis import Analysis as Analysis
from hullgeo.analysis import analyze as analyze
from hullgeo.class_hulls import nearest_hull as nearest_hull
from hullgeo.class_hulls import project_to_class_hulls as project_to_class_hulls
from hullgeo.crossing import find_crossing as find_crossing
from hullgeo.features import Classifier as Classifier
from hullgeo.features import LinearHead as LinearHead
from hullgeo.features import extract_features as extract_features
from hullgeo.features import from_arrays as from_arrays
from hullgeo.features import from_callables as from_callables
from hullgeo.flax_models import from_linen as from_linen
from hullgeo.flax_models import from_nnx as from_nnx
from hullgeo.flip import nearest_flip as nearest_flip
from hullgeo.guarantee import hull_guarantee as hull_guarantee
from hullgeo.guarantee import region_membership as region_membership
from hullgeo.head import boundary_distance as boundary_distance
from hullgeo.head import segment_classes as segment_classes
from hullgeo.homotopy import smoothed_start as smoothed_start
from hullgeo.hull import half_squared_distance as half_squared_distance
from hullgeo.hull import hull_distance as hull_distance
from hullgeo.hull import membership as membership
from hullgeo.hull import project_to_hull as project_to_hull
from hullgeo.hull_pairs import extreme_points as extreme_points
from hullgeo.hull_pairs import hull_diameter as hull_diameter
from hullgeo.hull_pairs import hull_to_hull as hull_to_hull
from hullgeo.inversion import invert_features as invert_features
from hullgeo.inversion import total_variation as total_variation
from hullgeo.morph import morph as morph
from hullgeo.nearest import nearest_boundary_point as nearest_boundary_point
from hullgeo.oracle import Hull as Hull
from hullgeo.partition import partition as partition
from hullgeo.plane import plane_cells as plane_cells
from hullgeo.plane import plane_classes as plane_classes
from hullgeo.prepare import prepare_hull as prepare_hull
from hullgeo.result import AmbiguousImage as AmbiguousImage
from hullgeo.result import BoundaryDistance as BoundaryDistance
from hullgeo.result import BoundaryPoint as BoundaryPoint
from hullgeo.result import Crossing as Crossing
from hullgeo.result import Domain as Domain
from hullgeo.result import Evidence as Evidence
from hullgeo.result import ExtremePoints as ExtremePoints
from hullgeo.result import Flip as Flip
from hullgeo.result import HullDiameter as HullDiameter
from hullgeo.result import HullGuarantee as HullGuarantee
from hullgeo.result import HullPair as HullPair
from hullgeo.result import HullProjection as HullProjection
from hullgeo.result import Inversion as Inversion
from hullgeo.result import Membership as Membership
from hullgeo.result import Morph as Morph
from hullgeo.result import NearestHull as NearestHull
from hullgeo.result import Partition as Partition
from hullgeo.result import PlaneCells as PlaneCells
from hullgeo.result import PlaneClasses as PlaneClasses
from hullgeo.result import Proof as Proof
from hullgeo.result import RegionMembership as RegionMembership
from hullgeo.result import SegmentClasses as SegmentClasses
from hullgeo.result import SegmentPath as SegmentPath
from hullgeo.result import SegmentTrace as SegmentTrace
from hullgeo.result import Status as Status
from hullgeo.result import TieMap as TieMap
from hullgeo.result import failed as failed
from hullgeo.result import raise_if_failed as raise_if_failed
from hullgeo.staging import load_stage as load_stage
from hullgeo.ties import tie_map as tie_map
from hullgeo.ties import tie_point as tie_point
from hullgeo.trace import segment_path as segment_path
from hullgeo.trace import trace_segment as trace_segment

__version__ = "0.1.0.dev1"
