// The yardstick of `./dev bench packet`: what packet_pass_xdp and packet_pass_tc do, by
// hand in C. Built by the benchmark with `clang -O2 -g -target bpf -mcpu=v3`.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define SEC(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))
#define be16(x) __builtin_bswap16(x)

static void *(*const map_lookup)(void *map, const void *key) = (void *)1;

struct {
    int (*type)[2]; // BPF_MAP_TYPE_ARRAY
    u32 *key;
    u64 *value;
    int (*max_entries)[1];
} PAYLOADS SEC(".maps");

struct ethernet {
    u8 destination[6], source[6];
    u16 type;
} __attribute__((packed));

struct vlan {
    u16 control, type;
} __attribute__((packed));

struct ipv4 {
    u8 version_ihl, tos;
    u16 total, id, fragment;
    u8 ttl, protocol;
    u16 checksum;
    u32 source, destination;
} __attribute__((packed));

struct ipv6 {
    u32 version;
    u16 length;
    u8 next, hop_limit;
    u8 source[16], destination[16];
} __attribute__((packed));

struct udp {
    u16 source, destination, length, checksum;
} __attribute__((packed));

INLINE void parse(void *data, void *end) {
    struct ethernet *ethernet = data;
    if ((void *)(ethernet + 1) > end)
        return;
    u16 type = ethernet->type;
    void *at = ethernet + 1;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (type != be16(0x8100) && type != be16(0x88a8) && type != be16(0x9100))
            break;
        struct vlan *vlan = at;
        if ((void *)(vlan + 1) > end)
            return;
        type = vlan->type;
        at = vlan + 1;
    }
    u8 protocol;
    if (type == be16(0x0800)) {
        struct ipv4 *ip = at;
        if ((void *)(ip + 1) > end)
            return;
        u32 length = (ip->version_ihl & 15) * 4;
        u32 total = be16(ip->total);
        if (ip->version_ihl >> 4 != 4 || length < 20 || total < length || at + total > end)
            return;
        if (ip->fragment & be16(0x1fff))
            return;
        protocol = ip->protocol;
        at += length;
    } else if (type == be16(0x86dd)) {
        struct ipv6 *ip = at;
        if ((void *)(ip + 1) > end || (ip->version & 0xf0) != 0x60)
            return;
        at = ip + 1;
        protocol = ip->next;
        for (int i = 0; i < 8; i++) {
            u32 length;
            if (at + 4 > end)
                return;
            u8 *header = at;
            if (protocol == 44) {
                if (*(u16 *)(header + 2) & be16(0xfff8))
                    return;
                length = 8;
            } else if (protocol == 51) {
                length = (header[1] + 2) * 4;
            } else if (protocol == 0 || protocol == 43 || protocol == 60) {
                length = (header[1] + 1) * 8;
            } else {
                break;
            }
            protocol = header[0];
            at += length;
        }
    } else {
        return;
    }
    if (protocol != 17)
        return;
    struct udp *udp = at;
    if ((void *)(udp + 1) > end)
        return;
    u8 *payload = (u8 *)(udp + 1);
    if (be16(udp->length) < 9 || (void *)(payload + 1) > end)
        return;
    u32 key = 0;
    u64 *count = map_lookup(&PAYLOADS, &key);
    if (count)
        *count += *payload;
}

struct xdp_md {
    u32 data, data_end;
};

SEC("xdp") int c_pass_xdp(struct xdp_md *ctx) {
    parse((void *)(u64)ctx->data, (void *)(u64)ctx->data_end);
    return 2;
}

struct sk_buff {
    u32 before[19], data, data_end;
};

SEC("classifier") int c_pass_tc(struct sk_buff *ctx) {
    parse((void *)(u64)ctx->data, (void *)(u64)ctx->data_end);
    return 0;
}

char LICENSE[] SEC("license") = "GPL";
