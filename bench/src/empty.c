// The bound of `./dev bench watch`: a program that returns at once. Built by the benchmark
// with `clang -O2 -g -target bpf -mcpu=v3`.

#define SEC(name) __attribute__((section(name), used))

SEC("raw_tracepoint/empty")
int empty(void *ctx)
{
    return 0;
}

char LICENSE[] SEC("license") = "Dual MIT/GPL";
