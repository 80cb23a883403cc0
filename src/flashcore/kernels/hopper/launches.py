"""Programmatic dependent launch: a launch whose blocks start while the launch before it on the stream still runs."""

from flashcore.kernels.hopper.gluon_api import gl, gluon


@gluon.jit
def wait_for_earlier_launch():
    """Wait until all that was launched before is done and its results are there: every thread, before it touches memory."""
    gl.inline_asm("griddepcontrol.wait;")


@gluon.jit
def let_next_launch_start():
    """Allow the next launch's blocks to start, once every block of this one has said so or ended."""
    gl.inline_asm("griddepcontrol.launch_dependents;")
