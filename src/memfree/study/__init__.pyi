from .study import study as study
from .text import text_study as text_study
