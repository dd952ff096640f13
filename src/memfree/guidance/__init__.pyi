from .amg import AntiMemorizationGuidance as AntiMemorizationGuidance
from .calibration import (
    Calibration as Calibration,
)
from .calibration import (
    calibrate as calibrate,
)
from .calibration import (
    calibration_of as calibration_of,
)
from .calibration import (
    default_similarity as default_similarity,
)
from .calibration import (
    measure as measure,
)
from .detection import Cadence as Cadence
from .detection import Observer as Observer
from .mitigation import Mitigation as Mitigation
from .mitigation import Start as Start
from .mitigation_names import TEXT_ONLY as TEXT_ONLY
from .mitigation_names import WITH_AMG as WITH_AMG
from .mitigation_names import WITH_INDEX as WITH_INDEX
from .multiplicity import MultiplicityGuidance as MultiplicityGuidance
from .prediction import Guidance as Guidance
from .prediction import Prediction as Prediction
from .prediction import apply as apply
from .settings import GuidanceSettings as GuidanceSettings
from .similarity import (
    EmbeddingSimilarity as EmbeddingSimilarity,
)
from .similarity import (
    Match as Match,
)
from .similarity import (
    NormalizedL2 as NormalizedL2,
)
from .similarity import (
    Similarity as Similarity,
)
from .steady_amg import SteadyAMG as SteadyAMG
from .threshold import (
    ConstantThreshold as ConstantThreshold,
)
from .threshold import (
    ThresholdSchedule as ThresholdSchedule,
)
