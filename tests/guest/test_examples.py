"""The files in examples/ work as they are: only paths, names and the processor's acceleration are replaced."""

import configparser
import json
import os
import shlex
import shutil
import socket as sockets
import subprocess
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.guest import GUEST_FOLDER, ROOT, VHOSTCACHE, host, libvirt, uml
from tests.guest.daemon import create_image
from tests.guest.lab import Lab, fio_job, verify, write
from tests.guest.qemu import Console, Disk, Guest

EXAMPLES = ROOT / "examples"
JOB = fio_job(0, 16, seed=51)


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    lab.close()


class _ScriptGuest(Guest):
    """A guest that examples/qemu.sh starts."""

    def command_line(self) -> list[str]:
        line = [
            "env",
            "ACCELERATORS=tcg",
            "MEMORY=512M",
            str(EXAMPLES / "qemu.sh"),
            str(self._disks[0].socket),
            "-nodefaults",
        ]
        line += ["-display", "none", "-no-reboot"]
        return [*line, "-kernel", str(GUEST_FOLDER / "vmlinuz"), "-initrd", str(GUEST_FOLDER / "initramfs")]


def test_the_qemu_script_starts_a_guest_that_uses_the_disk(lab: Lab) -> None:
    image = lab.image()
    daemon = lab.export(image)
    with _ScriptGuest(lab.logs / "guest", [Disk(lab.socket())]) as guest:
        assert guest.run("ls /sys/block/vda/mq | wc -l") == "2"
        write(guest, JOB)
    daemon.stop()
    host.verify_fio(image, JOB)


def test_the_libvirt_domain_is_valid_and_its_guest_uses_the_disk(lab: Lab) -> None:
    example = EXAMPLES / "libvirt.xml"
    subprocess.run(
        ["virt-xml-validate", example, "domain"], check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=60
    )
    # libvirt's QEMU is another user: it has to get to the files, and to the socket.
    lab.folder.chmod(0o755)
    image = lab.image()
    daemon = lab.export(image, "--socket-mode", "0666")
    for name in ("vmlinuz", "initramfs"):
        shutil.copy(GUEST_FOLDER / name, lab.folder)
    consoles = lab.folder / "console"
    consoles.mkdir()
    consoles.chmod(0o777)

    domain = ElementTree.parse(example).getroot()
    domain.set("type", "qemu")
    _one(domain, "devices/disk/source").set("path", str(lab.socket()))
    system = _one(domain, "os")
    system.remove(_one(system, "boot"))
    for tag, text in (
        ("kernel", lab.folder / "vmlinuz"),
        ("initrd", lab.folder / "initramfs"),
        ("cmdline", "console=ttyS0 panic=-1"),
    ):
        ElementTree.SubElement(system, tag).text = str(text)
    # The guest's second serial console takes commands (tests/guest/init).
    serial = ElementTree.SubElement(_one(domain, "devices"), "serial", type="unix")
    ElementTree.SubElement(serial, "source", mode="bind", path=str(consoles / "socket"))
    name = f"vhostcache-test-{os.getpid()}"
    _one(domain, "name").text = name
    file = lab.folder / "domain.xml"
    ElementTree.ElementTree(domain).write(file)

    with libvirt.running(lab.logs / "libvirt"):
        libvirt.virsh("create", file)
        try:
            stream = sockets.socket(sockets.AF_UNIX)
            with closing(Console(stream, lab.logs / "console.log")) as console:
                stream.connect(str(consoles / "socket"))
                guest = Guest.attach(console, lab.logs)
                assert guest.run("ls /sys/block/vda/mq | wc -l") == "2"
                write(guest, JOB)
                verify(guest, JOB)
        finally:
            libvirt.virsh("destroy", name)
    daemon.stop()
    host.verify_fio(image, JOB)


def test_the_configuration_fits_its_schema_and_serves_its_three_disks(lab: Lab) -> None:
    text = (EXAMPLES / "vhostcache.yaml").read_text()
    schema = json.loads(subprocess.run([VHOSTCACHE, "schema"], check=True, capture_output=True, timeout=60).stdout)
    jsonschema.validate(yaml.safe_load(text), schema)

    config = lab.folder / "vhostcache.yaml"
    config.write_text(text.replace("/run/vhostcache", str(lab.folder)).replace("/var/lib/vhostcache", str(lab.folder)))
    for name in ("system", "database", "installer"):
        create_image(lab.folder / f"{name}.img", "64MiB")
    daemon = lab.serve(config)
    status = json.loads(
        subprocess.run(
            [VHOSTCACHE, "status", "--json", lab.folder / "control.sock"], check=True, capture_output=True, timeout=60
        ).stdout
    )
    assert [volume["name"] for volume in status["volumes"]] == ["system", "database", "installer"]
    output = uml.run(
        'for d in vda vdb vdc; do echo "@@ disk $(cat /sys/block/$d/serial) $(cat /sys/block/$d/ro)"; done;'
        " mkfs.ext4 -q /dev/vda; mkfs.ext4 -q /dev/vdb",
        [lab.folder / f"{name}.sock" for name in ("system", "database", "installer")],
        lab.logs / "uml",
    )
    assert [line for line in output.splitlines() if line.startswith("@@ disk ")] == [
        "@@ disk system 0",
        "@@ disk db-0001 0",
        "@@ disk installer 1",
    ]
    daemon.stop()
    database = lab.folder / "database.img"
    cache = database.with_suffix(".cache")
    subprocess.run([VHOSTCACHE, "drain", cache, "--backend", database], check=True, capture_output=True, timeout=60)
    for name in ("system", "database"):
        host.check_ext4(lab.folder / f"{name}.img")
    assert host.allocated_bytes(lab.folder / "installer.img") == 0


def test_the_systemd_unit_is_valid_and_its_command_reports_readiness(lab: Lab) -> None:
    text = (EXAMPLES / "vhostcache.service").read_text()
    create_image(lab.folder / "a.img", "8MiB")
    config = lab.folder / "vhostcache.yaml"
    config.write_text("volumes: [{name: a, socket: a.sock, backend: {path: a.img}}]\n")
    unit = lab.folder / "vhostcache.service"
    unit.write_text(
        text.replace("/usr/local/bin/vhostcache", str(VHOSTCACHE)).replace("/etc/vhostcache.yaml", str(config))
    )
    subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit],
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
    )

    parsed = configparser.ConfigParser(interpolation=None)
    parsed.read(unit)
    assert parsed["Service"]["Type"] == "notify"
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(lab.folder / "notify"))
        supervisor.settimeout(30)
        with (lab.logs / "daemon.log").open("wb") as log:
            process = subprocess.Popen(
                shlex.split(parsed["Service"]["ExecStart"]),
                env={**os.environ, "NOTIFY_SOCKET": str(lab.folder / "notify")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            assert b"READY=1" in supervisor.recv(4096).splitlines()
            assert (lab.folder / "a.sock").is_socket()
        finally:
            process.terminate()
            assert process.wait(60) == 0


def _one(element: ElementTree.Element, path: str) -> ElementTree.Element:
    found = element.find(path)
    assert found is not None, path
    return found
