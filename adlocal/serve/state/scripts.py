"""What Redis runs for `RedisStore`, in Lua: the functions of `Database`. KEYS[1] is the prefix, ARGV[1] the clock.

Of each subject there is a hash `counters:SUBJECT` of values by kind, and a sorted set `leases:SUBJECT`, of
"KIND ID COST" by when they lapse. Numbers are doubles, which are whole up to 2^53 µs: the year 2255.
"""

_COMMON = """
local prefix = KEYS[1]

local function whole(number) return string.format('%.0f', number) end
local function counters(subject) return prefix .. 'counters:' .. subject end
local function leases(subject) return prefix .. 'leases:' .. subject end
local function member(charge, id) return charge.kind .. ' ' .. id .. ' ' .. whole(charge.cost) end

-- The store's time, which goes forward as the server's clock does, and stays when that is set back.
local function read_clock()
    local machine = tonumber(ARGV[1])
    if not machine then
        local parts = redis.call('TIME')
        machine = tonumber(parts[1]) * 1000000 + tonumber(parts[2])
    end
    local before = redis.call('HMGET', prefix .. 'clock', 'machine', 'time')
    local now = machine
    if before[1] then now = tonumber(before[2]) + math.max(0, machine - tonumber(before[1])) end
    redis.call('HSET', prefix .. 'clock', 'machine', whole(machine), 'time', whole(now))
    return now
end

local function value_of(subject, kind) return tonumber(redis.call('HGET', counters(subject), kind) or '0') end

local function add(subject, kind, rate, cost, at)
    local value = value_of(subject, kind)
    if rate then value = math.max(value, at) end
    redis.call('HSET', counters(subject), kind, whole(value + cost))
end

-- Settles what nobody renewed as if it had been used, at the time when it lapsed.
local function settle_lapsed(subject, now)
    local found = redis.call('ZRANGEBYSCORE', leases(subject), '-inf', whole(now), 'WITHSCORES')
    for i = 1, #found, 2 do
        local kind, cost = string.match(found[i], '^(%S+) %S+ (%d+)$')
        local lost = kind == 'max_parallel' and 0 or tonumber(cost)
        add(subject, kind, string.find(kind, '_per_', 1, true), lost, tonumber(found[i + 1]))
    end
    redis.call('ZREMRANGEBYSCORE', leases(subject), '-inf', whole(now))
end

local function level(charge, now)
    local held = 0
    for _, each in ipairs(redis.call('ZRANGE', leases(charge.subject), 0, -1)) do
        local kind, cost = string.match(each, '^(%S+) %S+ (%d+)$')
        if kind == charge.kind then held = held + tonumber(cost) end
    end
    local value = value_of(charge.subject, charge.kind)
    if charge.rate then value = math.max(0, value - now) end
    return value, held
end
"""

RESERVE = (
    _COMMON
    + """
local id, charges, lease, now = ARGV[2], cjson.decode(ARGV[3]), tonumber(ARGV[4]), read_clock()
local again, granted, answer = false, true, {1}
for _, charge in ipairs(charges) do settle_lapsed(charge.subject, now) end
for _, charge in ipairs(charges) do
    local settled, held = level(charge, now)
    table.insert(answer, settled)
    table.insert(answer, held)
    granted = granted and settled + held + charge.cost <= charge.limit
    again = again or (charge.held and redis.call('ZSCORE', leases(charge.subject), member(charge, id)))
end
if again then return answer end
if not granted then answer[1] = 0 return answer end
for _, charge in ipairs(charges) do
    if charge.held then
        redis.call('ZADD', leases(charge.subject), whole(now + lease), member(charge, id))
    else
        add(charge.subject, charge.kind, charge.rate, charge.cost, now)
    end
end
return answer
"""
)

RENEW = (
    _COMMON
    + """
local claims, expires = cjson.decode(ARGV[2]), whole(read_clock() + tonumber(ARGV[3]))
for _, claim in ipairs(claims) do
    for _, charge in ipairs(claim[2]) do
        if charge.held then redis.call('ZADD', leases(charge.subject), 'XX', expires, member(charge, claim[1])) end
    end
end
return {}
"""
)

SETTLE = (
    _COMMON
    + """
local id, charges, used, now = ARGV[2], cjson.decode(ARGV[3]), cjson.decode(ARGV[4]), read_clock()
for i, charge in ipairs(charges) do
    if charge.held and redis.call('ZREM', leases(charge.subject), member(charge, id)) == 1 then
        add(charge.subject, charge.kind, charge.rate, used[i], now)
    end
end
return {}
"""
)

LEVELS = (
    _COMMON
    + """
local charges, now, answer = cjson.decode(ARGV[2]), read_clock(), {}
for _, charge in ipairs(charges) do
    local settled, held = level(charge, now)
    table.insert(answer, settled)
    table.insert(answer, held)
end
return answer
"""
)
