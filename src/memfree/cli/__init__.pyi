from .entry import main as main
from .entry import run as run
from .entry import run_command as run_command
