"""An executor."""

from clbench.execution.units import admissible, leave_out
from clbench.processes import start_command


class OneByOne:
    """Runs one command after the other."""

    def __init__(self, parallel: int, folder) -> None:
        self.folder = folder

    def run(self, units, stop):
        statuses, todo = {}, list(units)
        while todo := leave_out(todo, statuses):
            stop.check("What is done is kept: run the same command again.")
            unit = admissible(todo, statuses)[0]
            todo.remove(unit)
            unit.log.parent.mkdir(parents=True, exist_ok=True)
            with unit.log.open("a") as log:
                statuses[unit.name] = start_command(unit.arguments, log=log).wait()
        return statuses
