"""Our programs and their peers, measured side by side: `scripts/bench`.

    images    the disks that are served
    servers   how each server is started, watched and stopped
    cases     what is measured, and how one measurement is made
    tools     nbdimg beside qemu-img
    report    a table, JSON and a picture of the ratios

Every figure of a case is taken from all servers in turn, round after round, so that a machine that grows slower or
busier in between does so for all of them; what counts are the ratios of the medians.
"""
