// SPDX-License-Identifier: Apache-2.0

package cann

import (
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport/native"
)

// documented are the statuses of the API, where they are written down for users.
func documented(t *testing.T) map[status.Code]string {
	t.Helper()
	text, err := os.ReadFile("../../python/llm_datadist/status.py")
	require.NoError(t, err)
	found := map[status.Code]string{}
	for _, match := range regexp.MustCompile(`(?m)^    (LLM_\w+) = (0x[0-9A-F]+|[0-9]+)$`).FindAllStringSubmatch(string(text), -1) {
		number, err := strconv.ParseUint(match[2], 0, 32)
		require.NoError(t, err)
		found[status.Code(number)] = match[1]
	}
	require.Len(t, found, 28)
	return found
}

func TestStatusesOfTheLibrary(t *testing.T) {
	o := opened(t, Config{Name: pullerName})
	pull := func(number uint32) error {
		planFaults(t, fmt.Sprintf("PullKvCache=fail:0x%X", number))
		err := o.Pull(&native.Transfer{Peer: ownerName, Bytes: 1, SrcTensors: all, DstTensors: all})
		require.Equal(t, status.StageTransfer, status.From(err, "").Stage)
		return err
	}
	for code, name := range documented(t) {
		require.True(t, code.Documented(), name)
		require.Equal(t, name, code.String())
		if code == status.Success {
			continue
		}
		err := pull(uint32(code))
		require.ErrorIs(t, err, code)
		require.ErrorContains(t, err, fmt.Sprintf("(0x%08X)", uint32(code)))
		require.IsType(t, &status.Error{}, err)
	}
	for number, text := range map[uint32]string{
		0x5010B014: "PullKvCache: LLM_CACHE_INCOMPATIBLE (0x5010B014)",
		0x5010B015: "PullKvCache: LLM_CACHE_KEY_ALREADY_EXIST (0x5010B015)",
		0x5010B016: "PullKvCache: LLM_COPY_CACHE_FAILED (0x5010B016)",
		0x5010B017: "PullKvCache: LLM_CACHE_ID_ALREADY_EXIST (0x5010B017)",
		0x1234:     "PullKvCache: a status that is not documented (0x00001234)",
		507054:     "PullKvCache: a status that is not documented (0x0007BCAE)",
	} {
		err := pull(number)
		require.Equal(t, status.Failed, status.CodeOf(err))
		require.ErrorContains(t, err, text)
		require.False(t, status.Code(number).Documented())
	}
}

func TestStagesOfTheLibrarysFailures(t *testing.T) {
	o := opened(t, Config{Name: pullerName})
	peer := netip.AddrPortFrom(loopback, o.Port())
	for _, c := range []struct {
		entry string
		stage status.Stage
		call  func() error
	}{
		{"RegisterKvCache", status.StageRegister, func() error {
			_, err := o.Register(plan.Shape{Count: 1, Stride: 1}, false, []uintptr{1})
			return err
		}},
		{"UnregisterKvCache", status.StageRegister, func() error { return o.Unregister(1) }},
		{"LinkLlmClusters", status.StageDial, func() error { return o.Link(9, loopback, peer, linkTimeout) }},
		{"link", status.StageDial, func() error { return o.Link(9, loopback, peer, linkTimeout) }},
		{"UnlinkLlmClusters", status.StageClose, func() error { return o.Unlink(9) }},
		{"PullKvBlocks", status.StageTransfer, func() error {
			return o.Pull(&native.Transfer{SrcTensors: all, DstTensors: all, SrcBlocks: []uint64{0}, DstBlocks: []uint64{0}})
		}},
		{"Initialize", status.StageCheck, func() error {
			_, err := Open(Config{ListenIP: loopback.String()})
			return err
		}},
	} {
		t.Run(c.entry, func(t *testing.T) {
			planFaults(t, c.entry+"=fail:0x5010B01B")
			err := c.call()
			require.ErrorIs(t, err, status.LinkBusy)
			require.Equal(t, c.stage, status.From(err, "").Stage)
		})
	}
}
