// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/cache"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// parse reads options in cache-manager mode. Pairs with a key in capitals are environment variables.
func parse(pairs ...string) (Options, error) {
	options, environment := map[string]string{"llm.EnableCacheManager": "1"}, map[string]string{}
	for i := 0; i < len(pairs); i += 2 {
		if strings.HasPrefix(pairs[i], "LLM_") {
			environment[pairs[i]] = pairs[i+1]
		} else {
			options[pairs[i]] = pairs[i+1]
		}
	}
	return ParseOptions(options, func(name string) (string, bool) {
		value, ok := environment[name]
		return value, ok
	})
}

func TestDefaultsOfOptions(t *testing.T) {
	o, err := parse()
	require.NoError(t, err)
	require.Equal(t, Options{
		CacheManager: true, SyncTimeout: time.Second, CopyThreads: min(4, runtime.NumCPU()), TCPConnections: 2, PeerDead: 5 * time.Second,
		LinkTotal: 2 * time.Minute, LinkTries: 1,
	}, o)
	o, err = ParseOptions(nil, func(string) (string, bool) { return "", false })
	require.NoError(t, err)
	require.False(t, o.CacheManager)
}

func TestOptionsAreRead(t *testing.T) {
	text := "{}"
	for _, c := range []struct {
		pairs []string
		want  func(o *Options)
	}{
		{[]string{"llm.EnableRemoteCacheAccessible", "1"}, func(o *Options) { o.OneSided = true }},
		{[]string{"llm.EnableRemoteCacheAccessible", "0"}, func(*Options) {}},
		{[]string{"llm.TransferBackend", "hixl"}, func(o *Options) { o.Directional = true }},
		{[]string{"llm.SyncKvCacheWaitTime", "250"}, func(o *Options) { o.SyncTimeout = 250 * time.Millisecond }},
		{[]string{"llm.ListenIp", "1.2.3.4", "llm.ListenPort", "5"}, func(o *Options) { o.ListenIP, o.ListenPort, o.HasListen = "1.2.3.4", "5", true }},
		{[]string{"llm.LocalCommRes", text}, func(o *Options) { o.LocalCommRes = &text }},
		{[]string{"llm.MemPoolConfig", `{"memory_size": 4096, "page_shift": 10}`}, func(o *Options) { o.DevicePool = &cache.PoolConfig{Bytes: 4096, PageShift: 10} }},
		{[]string{"llm.HostMemPoolConfig", `{"memory_size": 65536}`}, func(o *Options) { o.HostPool = &cache.PoolConfig{Bytes: 65536, PageShift: 16} }},
		{[]string{"llm.RdmaTrafficClass", "132", "llm.RdmaServiceLevel", "4", "llm.LinkTotalTime", "0", "ge.exec.deviceId", "3"}, func(o *Options) {
			o.DeviceID, o.LibraryOptions = 3, map[string]string{"llm.RdmaTrafficClass": "132", "llm.RdmaServiceLevel": "4"}
		}},
		{[]string{"llm.LinkTotalTime", "4294967295", "llm.LinkRetryCount", "100"}, func(o *Options) {
			o.LinkTotal, o.LinkTries = 4294967295*time.Second, 100
		}},
		{[]string{"open.RendezvousPort", "65535", "LLM_DATADIST_RENDEZVOUS_PORT", "1"}, func(o *Options) { o.RendezvousPort = 65535 }},
		{[]string{"LLM_DATADIST_RENDEZVOUS_PORT", "1"}, func(o *Options) { o.RendezvousPort = 1 }},
		{[]string{"llm.unknown", "x", "anything", ""}, func(*Options) {}},
		{[]string{"open.Device", "host", "open.Transport", "tcp"}, func(o *Options) { o.Device, o.Transport = "host", "tcp" }},
		{[]string{"open.Device", "auto", "open.Transport", "auto"}, func(o *Options) { o.Device, o.Transport = "auto", "auto" }},
		{[]string{"open.CopyThreads", "64", "open.TcpConnections", "16", "open.PeerDeadMillis", "100"}, func(o *Options) {
			o.CopyThreads, o.TCPConnections, o.PeerDead = 64, 16, 100*time.Millisecond
		}},
		{[]string{"open.MultipleEngines", "0", "open.Relink", "0", "open.Integrity", "off"}, func(*Options) {}},
		{[]string{"open.MultipleEngines", "1"}, func(o *Options) { o.MultipleEngines = true }},
		{[]string{"open.Fabric", "loopback"}, func(o *Options) { o.Loopback = true }},
		{[]string{"LLM_DATADIST_FABRIC", "loopback"}, func(o *Options) { o.Loopback = true }},
		{[]string{"LLM_DATADIST_DEVICE", "host", "LLM_DATADIST_TRANSPORT", "tcp"}, func(o *Options) { o.Device, o.Transport = "host", "tcp" }},
		{[]string{"LLM_DATADIST_COPY_THREADS", "3", "LLM_DATADIST_TCP_CONNECTIONS", "4", "LLM_DATADIST_PEER_DEAD_MILLIS", "700"}, func(o *Options) {
			o.CopyThreads, o.TCPConnections, o.PeerDead = 3, 4, 700*time.Millisecond
		}},
		{[]string{"open.SpinMicros", "0"}, func(*Options) {}},
		{[]string{"open.SpinMicros", "1000000"}, func(o *Options) { o.Spin = time.Second }},
		{[]string{"LLM_DATADIST_SPIN_MICROS", "200"}, func(o *Options) { o.Spin = 200 * time.Microsecond }},
		{[]string{"open.TcpConnections", "5", "LLM_DATADIST_TCP_CONNECTIONS", "nonsense"}, func(o *Options) { o.TCPConnections = 5 }},
		{[]string{"open.Transport", "tcp", "LLM_DATADIST_TRANSPORT", "ucx"}, func(o *Options) { o.Transport = "tcp" }},
		{[]string{"open.Device", "cann", "open.Transport", "cann"}, func(o *Options) { o.Device, o.Transport = "cann", "cann" }},
		{[]string{"LLM_DATADIST_DEVICE", "cann", "LLM_DATADIST_CANN_PATH", "/there"},
			func(o *Options) { o.Device, o.LibraryPath = "cann", "/there" }},
	} {
		want, err := parse()
		require.NoError(t, err)
		c.want(&want)
		got, err := parse(c.pairs...)
		require.NoError(t, err, "%q", c.pairs)
		require.Equal(t, want, got, "%q", c.pairs)
	}
}

func TestBadOptions(t *testing.T) {
	for _, c := range [][]string{
		{"llm.EnableRemoteCacheAccessible", "2"}, {"llm.EnableRemoteCacheAccessible", ""}, {"llm.TransferBackend", ""}, {"llm.TransferBackend", "HIXL"},
		{"ge.exec.deviceId", "0;1"}, {"ge.exec.deviceId", "-1"}, {"ge.exec.deviceId", "-0"}, {"llm.SyncKvCacheWaitTime", "1s"}, {"llm.SyncKvCacheWaitTime", "+1"},
		{"llm.SyncKvCacheWaitTime", ""}, {"llm.SyncKvCacheWaitTime", "99999999999999999999"}, {"llm.MemPoolConfig", "{"}, {"llm.MemPoolConfig", "{}"},
		{"llm.HostMemPoolConfig", `{"memory_size": -1}`}, {"llm.RdmaTrafficClass", "4294967296"}, {"llm.RdmaServiceLevel", "x"}, {"llm.LinkTotalTime", "soon"},
		{"llm.LinkRetryCount", "0"}, {"llm.LinkRetryCount", "101"},
		{"open.Transprot", "tcp"}, {"open.", "1"}, {"open.transport", "tcp"},
		{"open.Device", ""}, {"open.Device", "gpu"}, {"open.Transport", "TCP"}, {"open.Fabric", "x"}, {"open.MultipleEngines", "2"}, {"open.Relink", "yes"},
		{"open.Integrity", "on"}, {"open.CopyThreads", "0"}, {"open.CopyThreads", "65"}, {"open.CopyThreads", "+4"}, {"open.TcpConnections", "17"},
		{"open.TcpConnections", "two"}, {"open.PeerDeadMillis", "99"}, {"open.PeerDeadMillis", "1.5"},
		{"open.SpinMicros", "-1"}, {"open.SpinMicros", "1000001"}, {"open.SpinMicros", "0.5"}, {"LLM_DATADIST_SPIN_MICROS", "long"},
		{"LLM_DATADIST_DEVICE", "gpu"}, {"LLM_DATADIST_TRANSPORT", "rdma"}, {"LLM_DATADIST_INTEGRITY", "maybe"}, {"LLM_DATADIST_FABRIC", "x"},
		{"LLM_DATADIST_COPY_THREADS", "many"}, {"LLM_DATADIST_TCP_CONNECTIONS", "0"}, {"LLM_DATADIST_PEER_DEAD_MILLIS", "-5"},
	} {
		_, err := parse(c...)
		e := requireCode(t, status.ParamInvalid, err)
		if strings.HasPrefix(c[0], "open.") || strings.HasPrefix(c[0], "LLM_") {
			require.Contains(t, e.Cause, c[0], "it says which one")
		}
	}
}

func TestOptionsOfPartsThatAreNotBuilt(t *testing.T) {
	for _, c := range [][]string{
		{"open.Transport", "ucx"}, {"open.Relink", "1"}, {"open.Integrity", "sampled"},
		{"open.Integrity", "always"}, {"open.AuthSecretFile", "/x"}, {"open.TlsCertFile", "/x"}, {"open.TlsKeyFile", "/x"}, {"open.TlsCaFile", "/x"},
		{"open.MetricsAddress", "127.0.0.1:1"},
		{"LLM_DATADIST_TRANSPORT", "ucx"},
		{"LLM_DATADIST_INTEGRITY", "always"}, {"LLM_DATADIST_AUTH_SECRET_FILE", "/x"},
		{"LLM_DATADIST_TLS_CERT_FILE", "/x"}, {"LLM_DATADIST_TLS_KEY_FILE", "/x"}, {"LLM_DATADIST_TLS_CA_FILE", "/x"}, {"LLM_DATADIST_METRICS_ADDRESS", "x"},
	} {
		_, err := parse(c...)
		require.Contains(t, requireCode(t, status.FeatureNotEnabled, err).Cause, c[0])
	}
}

func TestOptionsWithoutAnEnvironmentVariableHaveNone(t *testing.T) {
	o, err := parse("LLM_DATADIST_MULTIPLE_ENGINES", "1", "LLM_DATADIST_RELINK", "1")
	require.NoError(t, err)
	require.False(t, o.MultipleEngines)
}
