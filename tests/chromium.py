"""A headless Chromium that is spoken to through a pipe, in its own protocol: no package is needed."""

import base64
import json
import os
import shutil
import subprocess
import sys

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
PATH = next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """One page of a browser.

    Args:
        folder: for what the browser keeps.
        width, height: of the window in pixels.
        scheme: ``'light'`` or ``'dark'``.
    """

    def __init__(self, folder, width=1200, height=900, scheme='light'):
        read, self._out = os.pipe()
        self._in, write = os.pipe()
        command = [PATH, '--headless', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run']
        command += ['--remote-debugging-pipe', f'--user-data-dir={folder}', 'about:blank']
        # It reads from descriptor 3 and writes to 4.
        start = 'import os, sys; a = sys.argv; os.dup2(int(a[1]), 3), os.dup2(int(a[2]), 4); os.execv(a[3], a[3:])'
        self._process = subprocess.Popen(
            [sys.executable, '-S', '-c', start, str(read), str(write), *command],
            pass_fds=(read, write),
            stderr=subprocess.DEVNULL,
        )
        os.close(read), os.close(write)
        self._number, self._rest, self._session, self.events = 0, b'', None, []
        (target,) = (t for t in self.call('Target.getTargets')['targetInfos'] if t['type'] == 'page')
        self._session = self.call('Target.attachToTarget', targetId=target['targetId'], flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Network', 'Log'):
            self.call(f'{domain}.enable')
        self.call('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value=scheme)])
        self.call(
            'Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def call(self, method, **params):
        """The result of a call; events that come meanwhile are kept."""
        self._number += 1
        message = dict(id=self._number, method=method, params=params)
        if self._session:
            message['sessionId'] = self._session
        os.write(self._out, json.dumps(message).encode() + b'\0')
        while True:
            answer = self._receive()
            if answer.get('id') == self._number:
                assert 'error' not in answer, answer
                return answer['result']
            self.events.append(answer)

    def _receive(self):
        while b'\0' not in self._rest:
            content = os.read(self._in, 1 << 20)
            assert content, 'the browser has ended'
            self._rest += content
        message, _, self._rest = self._rest.partition(b'\0')
        return json.loads(message)

    def open(self, url):
        """Open an address, and wait until it is loaded."""
        self.call('Page.navigate', url=url)
        while not any(event.get('method') == 'Page.loadEventFired' for event in self.events):
            self.events.append(self._receive())

    def run(self, expression):
        """The value of an expression of JavaScript in the page."""
        found = self.call('Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True)
        assert 'exceptionDetails' not in found, found
        return found['result'].get('value')

    def screenshot(self, file, whole=True):
        """Write a PNG, of all of the page."""
        file.write_bytes(
            base64.b64decode(self.call('Page.captureScreenshot', captureBeyondViewport=whole, format='png')['data'])
        )

    def close(self):
        """End the browser."""
        self._process.kill()
        self._process.wait()
        os.close(self._in), os.close(self._out)
