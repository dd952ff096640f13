from .block import guard as guard
from .guider import AntiMemorizationGuider as AntiMemorizationGuider
from .report import GuardReport as GuardReport
from .report import Verdict as Verdict
